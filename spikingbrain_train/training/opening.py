"""The first lines of a run: what is trained, on what, for how long, where results go and how to watch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.config.run import RunConfig, WandbMode
from spikingbrain_train.config.run_record import RunRecord, blend_shares, fingerprint
from spikingbrain_train.data.packing.layout import packing_of
from spikingbrain_train.data.packing.report import describe_packing, describe_statistics, warnings
from spikingbrain_train.data.packing.statistics import packing_statistics
from spikingbrain_train.evaluation.evaluator import HeldOutData
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.costs import total_parameters
from spikingbrain_train.planning.data_plan import plan_data
from spikingbrain_train.planning.data_position import position_of, samples_of
from spikingbrain_train.planning.plan_report.run import counts, engine_facts
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.planning.token_history import describe_end
from spikingbrain_train.reporting.metrics import METRICS_FILE
from spikingbrain_train.reporting.quantities import quantity
from spikingbrain_train.training.run_details import RUN_DETAILS_FILE

Row = tuple[str, str]
"""A name and what is to be said of it."""

_NAMED_SOURCES = 3
"""So many training datasets are listed one by one."""


def opening(
    config: RunConfig,
    groups: ProcessGroups,
    record: RunRecord,
    held_out: HeldOutData | None,
    *,
    resuming: bool,
) -> list[Row]:
    """What can be said of a run before its model is built.

    Args:
        config: its precision is settled.
        groups: process groups.
        record: which tokens it trains on.
        held_out: what evaluations read.
        resuming: whether it goes on.
    """
    return [
        ("stage", kind_of(config.stage).describe(config)),
        ("model", _model(config)),
        *_training_data(config, record),
        *(_packing(config) if groups.is_main_process else ()),
        *_held_out(config, held_out, resuming),
        ("length", _length(config)),
        *_all_tokens(config, record),
        ("ranks", _ranks(config, groups)),
        *_fp8(config, groups),
        ("output", _output(config)),
        ("watch", _watch(config)),
    ]


def _model(config: RunConfig) -> str:
    model = config.model
    total, training = total_parameters(model), kind_of(config.stage).trainable_parameters_in_all(model)
    trains = "all train" if training == total else f"{quantity(training)} train"
    mixers = counts(layer.mixer_name for layer in layers(model))
    return (
        f"{quantity(total)} parameters, {trains}; {model.num_layers} layers ({mixers}), "
        f"hidden size {model.hidden_size}"
    )


def _training_data(config: RunConfig, record: RunRecord) -> Iterator[Row]:
    stage, data = config.stage, config.data
    if kind_of(stage).reads_examples:
        yield from _examples(config)
        return
    prefixes, tokens = data.train_prefixes, [dataset.tokens for dataset in record.training_data]
    shares = blend_shares(data.train_weights, tokens, stage.seq_length)
    if not tokens or shares is None:  # the stage brings its own
        return
    samples, length = samples_of(config), stage.seq_length
    windows = [max((count - 1) // length, 1) for count in tokens]
    epochs = [samples * share / count for share, count in zip(shares, windows, strict=True)]
    if len(prefixes) > _NAMED_SOURCES:
        repeats = f"{min(epochs):.2f} to {max(epochs):.2f} epochs of each"
        yield "data", f"{quantity(sum(tokens))} tokens in {len(prefixes)} datasets, {repeats}"
        return
    for number, (prefix, count, share, epoch) in enumerate(
        zip(prefixes, tokens, shares, epochs, strict=True)
    ):
        blended = f", {share:.1%} of the blend" if len(prefixes) > 1 else ""
        yield "" if number else "data", f"{prefix}: {quantity(count)} tokens{blended}, {epoch:.2f} epochs"


def _packing(config: RunConfig) -> Iterator[Row]:
    """How samples are packed, and what comes of it; nothing where they are cut from text as it lies."""
    data = config.data
    packing = packing_of(data, config.stage.seq_length)
    if packing is None or not data.train_prefixes or kind_of(config.stage).reads_examples:
        return
    yield "packing", describe_packing(packing)
    for number, prefix in enumerate(data.train_prefixes):
        if number == _NAMED_SOURCES:
            left = len(data.train_prefixes) - number
            yield "", f"{left} other datasets likewise; spikingbrain-plan describes all"
            return
        found = packing_statistics(prefix, packing)
        named = f"{prefix}: " if len(data.train_prefixes) > 1 else ""
        yield "", f"{named}{describe_statistics(found)}"
        yield from (("warning", text) for text in warnings(found, f"data.train[{number}]"))


def _examples(config: RunConfig) -> Iterator[Row]:
    """How examples are packed, and what a sequence is too short for."""
    plan = plan_data(config)
    for number, source in enumerate(plan.train[:_NAMED_SOURCES]):
        found = source.examples
        if found is not None and source.epochs is not None:
            yield (
                "" if number else "data",
                f"{source.prefix}: {found.read:,} examples in {found.sequences:,} sequences, "
                f"{found.fill:.1%} filled, {source.epochs:.2f} epochs",
            )
    if len(plan.train) > _NAMED_SOURCES:
        left = len(plan.train) - _NAMED_SOURCES
        yield "", f"{left} other datasets likewise; spikingbrain-plan describes all"
    yield from (("warning", text) for text in plan.examples_warnings())


def _held_out(config: RunConfig, held_out: HeldOutData | None, resuming: bool) -> Iterator[Row]:
    if held_out is None:
        yield "held out", "nothing (data.valid is empty)"
        return
    read = [dataset for dataset in held_out.datasets if dataset.tokens > 0]
    interval = config.logging.eval_interval
    times = [] if resuming else ["at the start"]
    times += [f"every {interval:,} steps"] if interval else []
    when = "evaluated " + " and ".join(filter(None, [", ".join(times), "at the end"]))
    if not read:
        yield "held out", when
        return
    prefixes = ", ".join(dataset.prefix for dataset in read)
    yield "held out", f"{prefixes}: {quantity(sum(each.tokens for each in read))} tokens, {when}"
    missed = [dataset for dataset in held_out.datasets if dataset.tokens == 0]
    if missed:
        length, batch = config.stage.seq_length, config.stage.global_batch_size
        windows = sum(-(-(fingerprint(each.prefix).tokens - 1) // length) for each in held_out.datasets)
        unread, now = ", ".join(each.prefix for each in missed), config.logging.eval_iters
        enough = -(-windows // batch)
        yield "", f"not read: {unread}, before which logging.eval_iters={now} ends; {enough} reads all"


def _length(config: RunConfig) -> str:
    stage = config.stage
    length, tokens = f"{stage.seq_length:,} tokens", f"{quantity(_tokens(config))} tokens"
    if stage.train_iters == 0:
        return f"no steps: the closed-form start alone, on {stage.samples:,} sequences of {length}, {tokens}"
    from_here = ""
    if _tokens(config) != stage.tokens:  # steps before this start had another global batch
        from_here = f", those behind step {position_of(config).iteration:,}"
    each = f"{stage.global_batch_size:,} sequences of {length}"
    if ramp := stage.batch_sizes.describe():
        each += f" (at first {ramp})"
    return f"{stage.train_iters:,} steps{from_here} of {each}, {tokens}"


def _tokens(config: RunConfig) -> int:
    """Of the whole stage."""
    return samples_of(config) * config.stage.seq_length


def _all_tokens(config: RunConfig, record: RunRecord) -> Iterator[Row]:
    if record.history is not None:
        yield "tokens", f"at the end {describe_end(record.history, _tokens(config))}"


def _ranks(config: RunConfig, groups: ProcessGroups) -> str:
    size, precision = groups.world_size, config.precision.value
    device = groups.accelerator.device_name
    if size == 1:
        return f"1 on {device}, {precision}"
    degrees = {
        "data": groups.data_parallel_size,
        "tensor": groups.tensor_model_parallel_size,
        "pipeline": groups.pipeline_model_parallel_size,
        "context": groups.context_parallel_size,
    }
    layout = " x ".join(f"{degree} {name}" for name, degree in degrees.items() if degree > 1)
    experts = groups.expert_model_parallel_size
    over = [f"experts over {experts}"] if experts > 1 else []
    words = [f"{size:,} = {layout}", *over, *engine_facts(config.parallel), f"on {device}", precision]
    return ", ".join(words)


def _fp8(config: RunConfig, groups: ProcessGroups) -> Iterator[Row]:
    if config.fp8.format is None:
        return
    text = config.fp8.describe(config.model.num_layers)
    if not groups.accelerator.is_gpu:
        text += "; on CPUs a simulation: the numbers of FP8, more slowly than those of bf16"
    yield "fp8", f"{text}; evaluations in bf16"


def _output(config: RunConfig) -> str:
    interval = config.checkpoint.save_interval
    every = f"every {interval:,} steps and " if interval < config.stage.train_iters else ""
    return f"{config.output_dir}: checkpoints {every}at the end, {METRICS_FILE}, {RUN_DETAILS_FILE}"


def _watch(config: RunConfig) -> str:
    logging, folder = config.logging, Path(config.output_dir)
    ways = [f"tensorboard --logdir {folder / 'tensorboard'}"] if logging.tensorboard else []
    if logging.wandb is not WandbMode.disabled:
        ways.append(f"Weights & Biases, project {logging.wandb_project} ({logging.wandb.value})")
    return "; ".join([*ways, f"spikingbrain-plot {folder}"])
