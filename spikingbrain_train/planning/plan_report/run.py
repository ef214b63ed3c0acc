"""What runs: stage, model, ranks, batch, length, arithmetic, checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from spikingbrain_train.architecture.layers import feed_forwards_of, has_experts, layers
from spikingbrain_train.architecture.linear_transforms import transforms_of
from spikingbrain_train.config.parallel import EngineKind, ParallelConfig
from spikingbrain_train.config.run import OptimizerConfig
from spikingbrain_train.config.run_record import RunRecord, TokenHistory
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.planning.costs import active_parameters, new_parameters, total_parameters
from spikingbrain_train.planning.pipeline_balance import PipelineBalance, pipeline_balance
from spikingbrain_train.planning.plan_report.section import Section
from spikingbrain_train.planning.planner import Plan, plan_run
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.planning.token_history import describe_end, history_of
from spikingbrain_train.reporting.quantities import quantity, size
from spikingbrain_train.reporting.tables import facts

_LEAST_GAIN = 0.01
"""Share of a step's arithmetic that is worth a line."""


def run_section(plan: Plan) -> Section:
    """What runs."""
    model, stage = plan.config.model, plan.config.stage
    history = history_of(plan.config)
    record = RunRecord(plan.world_size, [], history)
    balance = _balance(plan)
    values = {
        "kind": stage.kind,
        "precision": plan.config.precision.value,
        "fp8": None if plan.config.fp8.format is None else plan.config.fp8.describe(model.num_layers),
        "parameters": total_parameters(model),
        "active_parameters": active_parameters(model),
        "new_parameters": new_parameters(model),
        "ranks": plan.world_size,
        "data_parallel_size": plan.data_parallel_size,
        "micro_batches": plan.micro_batches,
        "pipeline_bubble": plan.pipeline_bubble,
        "stage_flops_per_token": None if balance is None else balance.stages,
        "balanced_pipeline_layout": None if balance is None else balance.layout,
        "steps": stage.train_iters,
        "tokens_per_step": plan.tokens_per_step,
        "tokens": plan.total_tokens,
        "tokens_of_all_stages": record.all_tokens(plan.total_tokens),
        "source_tokens": history.source_tokens,
        "source_token_share": record.source_share(plan.total_tokens),
        "flops_per_token": plan.flops_per_token,
        "flops": plan.total_flops,
        "checkpoint_bytes": plan.checkpoint_bytes,
    }
    return Section("run", values, lambda width: facts(_rows(plan, history, balance), width))


def _rows(plan: Plan, history: TokenHistory, balance: PipelineBalance | None) -> list[tuple[str, str]]:
    stage, model, config = plan.config.stage, plan.config.model, plan.config
    learns = "" if not kind_of(stage).needs_teacher(stage) else f", learning from {stage.teacher}"
    bubble = f", pipeline bubble {plan.pipeline_bubble:.1%}" if len(plan.stages) > 1 else ""
    sinks = f" behind {model.num_sink_tokens} sinks" if model.num_sink_tokens else ""
    chosen = [("precision", plan.precision.describe())] if plan.precision.reason else []
    return [
        ("stage", f"{stage.kind} in {config.precision.name}{learns}"),
        *chosen,
        *((("fp8", config.fp8.describe(model.num_layers)),) if config.fp8.format is not None else ()),
        *(("model" if index == 0 else "", text) for index, text in enumerate(_model_facts(plan))),
        ("ranks", _rank_facts(plan)),
        (
            "step",
            f"{plan.tokens_per_step:,} tokens: {stage.global_batch_size} sequences of "
            f"{stage.seq_length}{sinks} = {plan.data_parallel_size} replicas x {plan.micro_batches} "
            f"micro-batches of {stage.micro_batch_size}{bubble}",
        ),
        *((("", words),) if (words := _stages(plan, balance)) else ()),
        *((("", f"smaller ones at first: {ramp}"),) if (ramp := stage.batch_sizes.describe()) else ()),
        ("length", f"{_steps(stage)}, {quantity(plan.total_tokens)} tokens"),
        *(("phases", text) for text in _phases(config.optimizer, stage.train_iters)),
        ("tokens", f"at the end {describe_end(history, plan.total_tokens)}"),
        (
            "compute",
            f"{plan.flops_per_token / 1e9:.4g} GFLOP per token, {plan.total_flops:.3g} FLOP in all",
        ),
        (
            "checkpoint",
            f"{size(plan.checkpoint_bytes)}, every {config.checkpoint.save_interval} steps and at the end",
        ),
    ]


def _balance(plan: Plan) -> PipelineBalance | None:
    """None where there is one stage, or a teacher runs beside the model."""
    config = plan.config
    if len(plan.stages) == 1 or kind_of(config.stage).needs_teacher(config.stage):
        return None
    return pipeline_balance(config.model, config.parallel, config.stage.seq_length)


def _stages(plan: Plan, balance: PipelineBalance | None) -> str:
    """How unequal pipeline stages are, and what would be better."""
    if balance is None or balance.gain < _LEAST_GAIN:
        return ""
    shares = " ".join(f"{share:.2f}" for share in balance.shares)
    layout = ",".join(str(number) for number in balance.layout)
    parallel = replace(plan.config.parallel, pipeline_model_parallel_layout=balance.layout)
    fullest = plan_run(replace(plan.config, parallel=parallel), plan.world_size).fullest
    return (
        f"pipeline stages wait for the longest: {shares} of the mean; "
        f"parallel.pipeline_model_parallel_layout=[{layout}] saves {balance.gain:.0%} of a step's work; "
        f"its fullest rank has {size(fullest.memory.total)} instead of {size(plan.fullest.memory.total)}"
    )


def _steps(stage: StageConfig) -> str:
    return f"{stage.train_iters:,} steps" if stage.train_iters else "no steps, the closed-form start alone"


def _phases(optimizer: OptimizerConfig, train_iters: int) -> list[str]:
    """What later phases of training change; nothing where there is one."""
    words = []
    for share in optimizer.phase_starts:
        first = int(share * train_iters) + 1
        phase = optimizer.later_phase(first, train_iters)
        if phase is not None:
            words.append(f"from step {first:,} learning rates times {phase[0]:g}, weight decay {phase[1]:g}")
    return ["; ".join(words)] if words else []


def _model_facts(plan: Plan) -> list[str]:
    model = plan.config.model
    padded = model.padded_vocab_size(plan.config.parallel.tensor_model_parallel_size)
    tied = "tied" if model.share_embeddings_and_output_weights else "untied"
    active = ""
    if has_experts(model):
        active = f"{quantity(active_parameters(model))} active per token, vocabulary included; "
    mixers = counts(layer.mixer_name for layer in layers(model))
    rows = [
        f"{quantity(total_parameters(model))} parameters ({active}{quantity(new_parameters(model))} "
        f"new): {model.num_layers} layers ({mixers}), hidden {model.hidden_size}, "
        f"FFN {model.ffn_hidden_size}",
        f"{model.num_attention_heads} heads in {model.num_query_groups} groups of width "
        f"{model.kv_channels}, vocabulary {model.vocab_size} (padded to {padded}, {tied})",
    ]
    if not all(kind.is_of_the_source and kind.describe(model) is None for kind in feed_forwards_of(model)):
        feed_forwards = counts(layer.feed_forward.name for layer in layers(model))
        described = [words for kind in feed_forwards_of(model) if (words := kind.describe(model))]
        rows.append("; ".join([f"feed-forwards: {feed_forwards}", *described]))
    return rows + [kind.describe(model) for kind in transforms_of(model)]


def _rank_facts(plan: Plan) -> str:
    parallel = plan.config.parallel
    degrees = [
        (plan.data_parallel_size, "data"),
        (parallel.tensor_model_parallel_size, "tensor"),
        (parallel.pipeline_model_parallel_size, "pipeline"),
        (parallel.context_parallel_size, "context"),
    ]
    parts = [" x ".join(f"{degree} {name}" for degree, name in degrees)]
    if has_experts(plan.config.model):
        parts.append(
            f"experts over {parallel.expert_model_parallel_size} expert x "
            f"{parallel.expert_tensor_size} expert tensor ranks of a stage"
        )
    switches = ["sequence_parallel", "use_distributed_optimizer", "overlap_grad_reduce"]
    chosen = [name for name in [*switches, "overlap_param_gather"] if getattr(parallel, name)]
    parts += engine_facts(parallel)
    parts.append(", ".join([*chosen, f"recompute {parallel.recompute.name}"]))
    return f"{plan.world_size} = " + "; ".join(parts)


def engine_facts(parallel: ParallelConfig) -> list[str]:
    """Who shards what, one line; none where megatron-core does."""
    if parallel.engine is EngineKind.deepspeed:
        offloaded = ", optimizer in host memory" if parallel.zero.offload_optimizer else ""
        return [f"DeepSpeed ZeRO {parallel.zero.stage}{offloaded}"]
    if parallel.engine is EngineKind.fsdp:
        return ["FSDP" if parallel.fsdp.reshard_after_forward else "FSDP that keeps gathered weights"]
    return []


def counts(names: Iterable[str]) -> str:
    """How often each occurs: "14 gla + 14 swa"."""
    return " + ".join(f"{count} {name}" for name, count in Counter(names).items())
