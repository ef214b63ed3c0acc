"""Memory of every pipeline stage's ranks, whether it fits, and what would help."""

from __future__ import annotations

import textwrap
from typing import Any

from spikingbrain_train.architecture.layers import feed_forwards_of, has_experts
from spikingbrain_train.config.parallel import Recompute
from spikingbrain_train.planning.fit import MARGIN, DeviceMemory, Fit, device_memory
from spikingbrain_train.planning.memory import GIB
from spikingbrain_train.planning.plan_report.section import Section
from spikingbrain_train.planning.planner import Plan, StagePlan
from spikingbrain_train.planning.remedies import Remedy, remedies, together
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.reporting.quantities import size
from spikingbrain_train.reporting.tables import packed, spans, table

_MOST_REMEDIES = 5
_WIDEST_SETTINGS = 56


def memory_section(plan: Plan) -> Section:
    """The estimate of every stage, and the verdict where the device's memory is known."""
    device = device_memory(plan.config.cluster, plan.world_size)
    fits = device is None or device.fit(plan.fullest.memory.total) is Fit.fits
    found = [] if device is None or fits else remedies(plan, device)
    combined = None
    if device is not None and found and all(device.fit(remedy.needed) is not Fit.fits for remedy in found):
        combined = together(found, device)

    values = {
        "stages": [_values(index, stage, device) for index, stage in enumerate(plan.stages)],
        "device_bytes": None if device is None else device.bytes,
        "margin_bytes": None if device is None else MARGIN * device.bytes,
        "fit": None if device is None else device.fit(plan.fullest.memory.total).value,
        "most_kept_by_experts_bytes": _most_kept_by_experts(plan),
        "copies_of_experts": _copies_of_experts(plan),
        "remedies": [_remedy_values(remedy, device) for remedy in found if device is not None],
        "together": None if combined is None or device is None else _remedy_values(combined, device),
    }

    def text(width: int) -> list[str]:
        unit, name = _unit(plan)
        head = f"memory of a rank in {name}, estimated; parameters are exact"
        lines = [head, *_table(plan, device, unit)]
        lines += ["", *_wrapped(_alike(plan), width)]
        if device is None:
            return lines
        lines += _wrapped(_margin(device), width)
        return lines if fits else lines + ["", *_advice(plan, device, found, combined, width)]

    return Section("memory", values, text)


def _values(index: int, stage: StagePlan, device: DeviceMemory | None) -> dict[str, Any]:
    return {
        "stage": index,
        "layers": [stage.virtual_stages[0].start, stage.virtual_stages[-1].stop - 1],
        "virtual_stages": [[layers.start, layers.stop - 1] for layers in stage.virtual_stages],
        "parameters": stage.parameters,
        **{f"{name}_bytes": value for name, value in vars(stage.memory).items()},
        "total_bytes": stage.memory.total,
        "fit": None if device is None else device.fit(stage.memory.total).value,
    }


def _remedy_values(remedy: Remedy, device: DeviceMemory) -> dict[str, Any]:
    return {
        "settings": remedy.arguments(),
        "ranks": remedy.plan.world_size,
        "total_bytes": remedy.needed,
        "fit": device.fit(remedy.needed).value,
    }


def _unit(plan: Plan) -> tuple[int, str]:
    """What the table counts in: GiB, or MiB for a model that is small."""
    return (GIB, "GiB") if plan.fullest.memory.total >= GIB else (2**20, "MiB")


def _table(plan: Plan, device: DeviceMemory | None, unit: int) -> list[str]:
    with_teacher = kind_of(plan.config.stage).needs_teacher(plan.config.stage)
    rows = [
        [
            *("stage", "layers", "parameters", "weights", "gradients", "optimizer", "activations"),
            *(["teacher"] if with_teacher else []),
            "total",
            *([] if device is None else ["verdict"]),
        ]
    ]
    first, same = 0, None
    for index, stage in enumerate(plan.stages):
        memory = stage.memory
        parts = [memory.weights, memory.gradients, memory.optimizer, memory.activations]
        parts += [memory.teacher] if with_teacher else []
        cells = [f"{stage.parameters:,}", *(f"{part / unit:.2f}" for part in [*parts, memory.total])]
        cells += [] if device is None else [_verdict(memory.total, device, unit)]
        if cells == same:  # stages that are alike are one row
            rows[-1][:2] = [f"{first}-{index}", _layers(plan.stages[first], stage)]
            continue
        first, same = index, cells
        rows.append([str(index), _layers(stage, stage), *cells])
    return table(rows, left=2)


def _layers(first: StagePlan, last: StagePlan) -> str:
    """Of pipeline stages from ``first`` to ``last``: ``0-3``, or with virtual stages ``0-1, 4-5``."""
    pairs = zip(first.virtual_stages, last.virtual_stages, strict=True)
    return ", ".join(spans(range(begin.start, end.stop)) for begin, end in pairs)


def _verdict(needed: float, device: DeviceMemory, unit: int) -> str:
    fit = device.fit(needed)
    if fit is Fit.too_large:
        return f"{(needed - device.bytes) / unit:.2f} too much"
    return fit.value


def _alike(plan: Plan) -> str:
    if plan.world_size == len(plan.stages):
        text = ""
    else:
        text = "Every rank of a stage holds as much"
        if plan.config.parallel.context_parallel_size > 1:
            text += " or less: of context-parallel ranks the fullest is shown"
        text += ". "
    if has_experts(plan.config.model):
        text += "Experts are taken to be evenly loaded; where they are not, some ranks need more. "
    if (most := _most_kept_by_experts(plan)) is not None:
        tokens = plan.config.parallel.recompute_expert_tokens
        text += (
            f"Beside what they read, the experts of a layer keep at most {size(most)} of a micro-batch: "
            f"those with more than {tokens:,} tokens compute the rest again. "
        )
    if (copies := _copies_of_experts(plan)) is not None:
        parallel = plan.config.parallel
        is_kept = parallel.recompute not in (Recompute.full, Recompute.moe_layer)
        how_long = "for every layer and micro-batch on its way" if is_kept else "while that layer is computed"
        text += (
            f"parallel.replicate_expert_load={parallel.replicate_expert_load:g} adds {size(copies['bytes'])} "
            f"a copied expert on each rank, at most {copies['most']} in a layer, {how_long}. "
        )
    return text + "Workspaces, communication buffers and fragmentation come on top."


def _most_kept_by_experts(plan: Plan) -> float | None:
    """Bytes of a micro-batch and layer on one rank; None where their tokens set no bound."""
    found = [kind.most_kept_by_experts(plan.config) for kind in feed_forwards_of(plan.config.model)]
    return max((bound for bound in found if bound is not None), default=None)


def _copies_of_experts(plan: Plan) -> dict[str, float] | None:
    """Of busy experts in one layer: the most that are copied at once, and bytes of one on each rank."""
    found = [kind.copies_of_experts(plan.config) for kind in feed_forwards_of(plan.config.model)]
    most = max((copies for copies in found if copies is not None), default=None)
    return None if most is None else {"most": most[0], "bytes": most[1]}


def _margin(device: DeviceMemory) -> str:
    gib = device.bytes / GIB
    return (
        f"Of {gib:.1f} GiB a rank ({device.source}) {MARGIN:.0%}, {MARGIN * gib:.1f} GiB, are for these: "
        f"up to {(1 - MARGIN) * gib:.1f} GiB fit, up to {gib:.1f} GiB are tight, more does not fit."
    )


def _advice(
    plan: Plan, device: DeviceMemory, found: list[Remedy], combined: Remedy | None, width: int
) -> list[str]:
    if not found:
        return _wrapped(
            "No single setting of parallelism, recomputation or micro-batch makes it smaller; take a smaller "
            "model or a shorter sequence.",
            width,
        )
    unit, name = _unit(plan)
    now = f"now {plan.fullest.memory.total / unit:.2f}"
    lines = [f"what would help, planned anew: the fullest rank in {name}, {now}"]
    rows = [["settings", "ranks", "total", "verdict"]]
    shown = found[:_MOST_REMEDIES] + ([] if combined is None else [combined])
    for remedy in shown:
        verdict = _verdict(remedy.needed, device, unit)
        ranks, total = str(remedy.plan.world_size), f"{remedy.needed / unit:.2f}"
        first, *others = packed(remedy.arguments(), " ", _WIDEST_SETTINGS)
        rows.append([first, ranks, total, verdict])
        rows += [[f"  {line}", "", "", ""] for line in others]
    lines += table(rows, left=1)
    if combined is None and all(device.fit(remedy.needed) is not Fit.fits for remedy in found):
        lines += _wrapped("Not even several of them together fit; take more ranks and higher degrees.", width)
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)
