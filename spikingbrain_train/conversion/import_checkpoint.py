"""Hugging Face checkpoint -> Megatron checkpoint, with the mixer swap and the upcycling on the way."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from spikingbrain_train.architecture.feed_forwards import ACTIVATION_SETTINGS, FEED_FORWARDS
from spikingbrain_train.architecture.layers import (
    attends_everywhere,
    feed_forwards_of,
    has_experts,
    layers,
    mixers_of,
)
from spikingbrain_train.architecture.model_checks import check_model
from spikingbrain_train.architecture.submodule_kind import SubmoduleKind
from spikingbrain_train.checkpoint.data_files import complete_checkpoint
from spikingbrain_train.config.conversion import ConversionConfig, UpcyclingForm
from spikingbrain_train.config.load import save_config
from spikingbrain_train.config.model import AND_SO_ON, ModelConfig
from spikingbrain_train.config.sections import with_layers
from spikingbrain_train.config.setting import check_fields
from spikingbrain_train.conversion.account import Account, Use, save_checksums
from spikingbrain_train.conversion.companion_files import find_companion_files
from spikingbrain_train.conversion.hf_config import read_hf_config
from spikingbrain_train.conversion.import_parts import Converter, ImportParts, Planned
from spikingbrain_train.conversion.packed_ternary import open_tensors
from spikingbrain_train.conversion.parts import damage_in, stored_chunks
from spikingbrain_train.conversion.report import ConversionReport, describe_layers
from spikingbrain_train.conversion.source import Source
from spikingbrain_train.conversion.source_check import check_source
from spikingbrain_train.conversion.weight_values import describe_damage
from spikingbrain_train.conversion.window_convention import WindowConvention
from spikingbrain_train.conversion.work import Work
from spikingbrain_train.conversion.work_key import source_files, work_key
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.storage.checkpoint_folder import (
    HF_SOURCE_FOLDER,
    LATEST_ITERATION_FILE,
    MODEL_CONFIG_FILE,
    iteration_folder,
)
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE, load_config_json
from spikingbrain_train.storage.journal import Journal
from spikingbrain_train.storage.tokenizer_files import has_tokenizer

_ATTENTION = "sizes of the source's attention output"


def import_checkpoint(
    hf_folder: Path,
    output: Path,
    conversion: ConversionConfig | None = None,
    *,
    window_convention: WindowConvention | None = None,
    overwrite: bool = False,
    allow_damaged_weights: bool = False,
    workers: int | None = 1,
    dry_run: bool = False,
    progress: bool = False,
) -> ConversionReport:
    """Write the Hugging Face checkpoint ``hf_folder`` as the Megatron checkpoint ``output/iter_0000000``.

    Tensors stream one by one: memory does not grow with the model. No GPU, no process group. A call that was
    killed is gone on with by the next one with the same source and settings, to the same bytes.

    Args:
        hf_folder: config.json and safetensors of a model of a known family (conversion/formats/registry.py).
        output: folder to be made; it appears whole or not at all.
        conversion: mixers, feed-forwards and sinks of the result. None keeps the source's.
        window_convention: what ``sliding_window`` of a published SpikingBrain-7B folder counts; None takes
            it as the published default code does, and the report says so.
        overwrite: replace an earlier result in ``output``.
        allow_damaged_weights: import tensors that hold NaN, infinities or only zeros, with a note.
        workers: processes that read and write, each as large as one parameter; None takes what the machine
            has and the model is worth. The result does not depend on it.
        dry_run: check everything but the values and report, with what it will take, without writing.
        progress: say on standard error how far it is.

    Raises:
        CheckpointError: the source is malformed, damaged or unsupported, or the output cannot be written.
        ConfigurationError: the recipe does not fit the source, or the source leaves nothing for
            ``window_convention`` to say.
    """
    started = time.monotonic()
    hf_format, source = read_hf_config(hf_folder, window_convention)
    hf_notes = hf_format.notes_on_import(hf_folder, load_config_json(hf_folder), source, window_convention)
    if conversion is not None:
        check_fields(conversion)
    target = _target(source, conversion, hf_folder)
    check_model(target)
    reader = open_tensors(hf_folder, hf_format, source)
    left_out = check_source(reader, hf_format, source)
    recipe = conversion or ConversionConfig()  # without one the source is copied, and none of it is used
    tensors = Source(reader, hf_format, source, allow_damaged_weights=allow_damaged_weights)
    converter = Converter(tensors, recipe)
    plan = converter.plan(target)
    report = ConversionReport(
        source=str(hf_folder),
        output=str(output),
        architecture=hf_format.architecture,
        layers=describe_layers(target),
        dry_run=dry_run,
        ignored=left_out.sentences(),
        bytes=sum(planned.nbytes for planned in plan),
    )
    for planned in plan:
        group = planned.parameter.weight.group
        report.count(group, converter.origin(planned), planned.parameter.numel)
    report.notes += _notes_on_dtypes(plan)
    if unused := tensors.unused(planned.parameter for planned in plan):
        report.ignored.append(
            f"{len(unused)} tensors such as {unused[0]}, which have no part in the new layers"
        )
        left_out.reasons |= dict.fromkeys(unused, "has no part in the new layers")
    for name in _too_long(recipe, source) if conversion is not None else []:
        report.notes.append(
            f"{name} of the recipe lists {len(getattr(recipe, name))} layers, of which the source has the "
            f"first {source.num_layers}; {name}=[...] chooses others"
        )
    report.notes += hf_notes + _notes_on_windows(source, target) + _notes_on_activation(source, target)
    report.notes += _notes_on_sub_norms(source, target)
    report.notes += _notes(target, recipe, drawn=report.new_parameters > 0)
    companions = find_companion_files(hf_folder)
    report.notes += companions.left_behind
    if not has_tokenizer(hf_folder):
        report.notes.append(f"{hf_folder} has no tokenizer; name one with data.tokenizer when training")
    parts = ImportParts(converter, plan)
    key = work_key(
        "import",
        source_files(reader.paths) + source_files([hf_folder / CONFIG_FILE]),
        target,
        recipe,
        allow_damaged_weights,
        [(planned.parameter.name, str(planned.dtype), planned.in_source) for planned in plan],
        parts.sizes,
    )
    work = Work.plan(
        parts,
        output,
        key,
        source=hf_folder,
        reads=reader.nbytes,
        marker=LATEST_ITERATION_FILE,
        workers=workers,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=progress,
    )
    if work.is_over(report):
        return report

    account = Account(
        reader.specs,
        {(name, planned.parameter.name) for planned in plan for name in converter.tensors(planned)},
        left_out.reasons,
    )
    with work.begun() as workspace:
        checkpoint = iteration_folder(workspace.new, 0)
        shutil.rmtree(checkpoint / HF_SOURCE_FOLDER, ignore_errors=True)
        (checkpoint / HF_SOURCE_FOLDER).mkdir(parents=True)
        companions.copy_to(checkpoint / HF_SOURCE_FOLDER)
        _measure_attention(converter, plan, workspace.journal, progress=progress)
        records = work.write(workspace, checkpoint, "importing")
        elements = {planned.parameter.name: planned.parameter.numel for planned in plan}
        complete_checkpoint(checkpoint, stored_chunks(records, elements))
        save_config(target, checkpoint / MODEL_CONFIG_FILE)
        checksums = account.close(Use(**use) for record in records for use in record["uses"])
        save_checksums(checksums, workspace.new)
        report.notes += describe_damage(damage_in(records))
        report.checked = account.describe()
        report.seconds = time.monotonic() - started
        report.save(workspace.new)
        (workspace.new / LATEST_ITERATION_FILE).write_text("0", encoding="utf-8")
    return report


def _measure_attention(
    converter: Converter, plan: list[Planned], journal: Journal, *, progress: bool
) -> None:
    """Run the source's layers once, for all parts, where new parameters depend on them."""
    norms = converter.measures_sub_norms(plan)
    measured = [*converter.measures_attention(plan), *(layer for layer, _ in norms)]
    if not measured:
        return
    scale = converter.new.attention_scale
    known = journal.entries.get(_ATTENTION)
    if known is not None and not norms:
        scale.scales = list(known)
        return
    with activity("running the source's layers", max(measured) + 1, "layers", shown=progress) as done:
        for layer in done.over(range(max(measured) + 1)):
            scale.of_layer(layer)
            for number, role in norms:
                if number == layer:
                    scale.sub_norm(role, layer)
    if known is None:
        journal.add(_ATTENTION, scale.scales)


def _target(source: ModelConfig, conversion: ConversionConfig | None, hf_folder: Path) -> ModelConfig:
    """The architecture of the result: the source's sizes with the recipe's layers."""
    if conversion is None:
        return source
    if conversion.keep_mixers:
        conversion = _with_mixers_of(source, conversion)
    elif not attends_everywhere(source):
        raise CheckpointError(
            f"{hf_folder} is a hybrid already, whose mixers are not converted again; add keep_mixers=true to "
            "change its feed-forwards alone, or leave --conversion out"
        )
    asked = [FEED_FORWARDS[name] for name in conversion.feed_forwards if name != AND_SO_ON]
    if has_experts(source) and not any(kind.routes_tokens for kind in asked):
        kept = _of_kinds(feed_forwards_of(source), source, conversion) | {"feed_forwards"}
        conversion = replace(conversion, **{name: getattr(source, name) for name in kept})
    for name in _too_long(conversion, source):
        conversion = replace(conversion, **{name: getattr(conversion, name)[: source.num_layers]})
    for name in ("attn_sub_norm", "ffn_sub_norm"):
        if getattr(source, name) and getattr(conversion, name) is False:
            raise ConfigurationError(
                f"{name}=false would take norms out of {hf_folder} that its projections were trained behind; "
                f"leave {name} at null"
            )
    target = with_layers(source, conversion)
    for has, wants in zip(layers(source), layers(target), strict=True):
        if has.feed_forward is not wants.feed_forward:
            wants.feed_forward.check_source(target)
    _check_feed_forwards(source, target, hf_folder)
    if target.num_sink_tokens > target.vocab_size:
        raise ConfigurationError(
            f"num_sink_tokens={target.num_sink_tokens} is more than the source has embeddings to start them "
            f"from; use at most {target.vocab_size}"
        )
    return target


def _with_mixers_of(source: ModelConfig, conversion: ConversionConfig) -> ConversionConfig:
    """The recipe with everything before the feed-forwards as the source has it."""
    kept = _of_kinds(mixers_of(source), source, conversion) | {"mixers", "parallel_hybrid"}
    if source.num_sink_tokens:
        kept |= {"num_sink_tokens"}
    return replace(conversion, **{name: getattr(source, name) for name in kept})


def _of_kinds(kinds: Iterable[SubmoduleKind], source: ModelConfig, recipe: ConversionConfig) -> set[str]:
    """Settings and sections of a recipe that some kinds read."""
    names = {name.partition(".")[0] for kind in kinds for name in kind.all_settings(source)}
    # The activation of a recipe is its own choice, and null where it makes none.
    return {name for name in names - ACTIVATION_SETTINGS if hasattr(recipe, name)}


def _check_feed_forwards(source: ModelConfig, target: ModelConfig, hf_folder: Path) -> None:
    """Experts are made of dense feed-forwards, or stay what they are. Raises ConfigurationError."""
    for number, (has, wants) in enumerate(zip(layers(source), layers(target), strict=True)):
        changes = has.feed_forward_weights(source) != wants.feed_forward_weights(target)
        if has.feed_forward.routes_tokens and changes:
            raise ConfigurationError(
                f"layer {number} of {hf_folder} has {has.feed_forward.describe(source)} already, of which no "
                f"other feed-forward is made; keep feed_forwards and moe as the source has them"
            )


def _too_long(recipe: ConversionConfig, source: ModelConfig) -> list[str]:
    """The lists of layers of which a source with fewer takes the first entries."""
    lists = {"mixers": recipe.mixers, "feed_forwards": recipe.feed_forwards}
    return [
        name for name, listed in lists.items() if len(listed) > source.num_layers and AND_SO_ON not in listed
    ]


def _notes_on_windows(source: ModelConfig, target: ModelConfig) -> list[str]:
    """Where softmax attention sees another number of tokens than the source's."""
    others: dict[tuple[int | None, int | None], list[int]] = {}
    for number, (has, wants) in enumerate(zip(layers(source), layers(target), strict=True)):
        seen = has.mixers[0].window(source) if len(has.mixers) == 1 else None
        for kind in wants.mixers:
            if seen is not None and kind.family == has.mixers[0].family and kind.window(target) != seen:
                others.setdefault((seen, kind.window(target)), []).append(number)
    return [
        f"softmax attention of layers {', '.join(map(str, numbers))} saw {seen} tokens in the source and "
        f"sees {'all' if now is None else now}; sliding_window={seen} keeps the source's window"
        for (seen, now), numbers in others.items()
    ]


def _notes_on_activation(source: ModelConfig, target: ModelConfig) -> list[str]:
    """Where the gates of feed-forwards go through another function than the source's."""
    before, now = source.activation_func, target.activation_func
    if before is now:
        return []
    return [
        f"feed-forwards compute {now.value} where the source's compute {before.value}: their weights are the "
        f"source's, and the model has to be trained to be as good again"
    ]


def _notes_on_sub_norms(source: ModelConfig, target: ModelConfig) -> list[str]:
    """Where projections read normed inputs that read their inputs themselves in the source."""
    names = ("attn_sub_norm", "ffn_sub_norm")
    new = [name for name in names if getattr(target, name) and not getattr(source, name)]
    if not new:
        return []
    return [
        f"the source has no {' and no '.join(new)}: norms begin at the size of what its "
        f"projections read, but a token's own is gone behind them, and the model has to be trained"
    ]


def _notes_on_dtypes(plan: list[Planned]) -> list[str]:
    """Where the source's tensors are of several number formats."""
    of_source = Counter(planned.dtype for planned in plan if planned.in_source)
    if len(of_source) < 2:
        return []
    listed = ", ".join(
        f"{number} in {str(dtype).removeprefix('torch.')}" for dtype, number in of_source.most_common()
    )
    return [f"the source's number formats differ, and parameters keep theirs: {listed}"]


def _notes(target: ModelConfig, recipe: ConversionConfig, *, drawn: bool) -> list[str]:
    """What the table of the report cannot say."""
    notes = [f"new parameters are drawn with seed {recipe.seed}"] if drawn else []
    upcycling = recipe.upcycling
    if has_experts(target) and upcycling.form is UpcyclingForm.exact and upcycling.reinit_fraction:
        notes.append(
            "upcycling.reinit_fraction replaces a part of the copies, so the result starts near the dense "
            "function, not at it"
        )
    return notes
