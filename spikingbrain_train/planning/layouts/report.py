"""What a search says: a table, sentences on what was left aside, plain values for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from spikingbrain_train.config.parallel import WEIGHTS_STAGE
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.fit import MARGIN
from spikingbrain_train.planning.layouts.search import MEMORY, Found, Search, Smallest
from spikingbrain_train.planning.memory import GIB
from spikingbrain_train.planning.step_time import fp8_saving, peak_flops
from spikingbrain_train.reporting.quantities import quantity
from spikingbrain_train.reporting.tables import facts, table

_MOST_REASONS = 6


def render(searches: Sequence[Search], efficiency: float, width: int) -> str:
    """One search as a list of its layouts; several as the fastest of each."""
    first = searches[0]
    lines = facts(_head(first, efficiency, with_gpus=len(searches) == 1), width)
    if len(searches) == 1:
        lines += ["", *_layouts(first), "", *_set_aside(first, width)]
    else:
        lines += ["", *_scaling(searches)]
    return "\n".join(lines)


def as_values(searches: Sequence[Search], efficiency: float) -> list[dict[str, Any]]:
    """The same as plain values, which JSON takes."""
    return [
        {
            "gpus": each.world_size,
            "global_batch_size": each.config.stage.global_batch_size,
            "seq_length": each.config.stage.seq_length,
            "device_bytes": each.device.bytes,
            "peak_tflops": each.config.cluster.peak_tflops,
            "efficiency": efficiency,
            "layouts": [_values(found) for found in each.found],
            "tried": each.tried,
            "slower": each.slower,
            "rejected": [
                {"number": each.rejections.number[group], "example": each.rejections.example[group]}
                for group in each.rejections.number
            ],
        }
        for each in searches
    ]


def nothing_fits(found: Search, enough: int | None) -> ConfigurationError:
    """Why a search has found nothing, and what would be needed.

    Args:
        found: a search without layouts.
        enough: GPUs on which one fits; None where none of the numbers that were tried is enough.
    """
    gpus, smallest = found.world_size, found.smallest
    if smallest is None:
        reasons = _reasons(found, besides=MEMORY)
        why = reasons[0] if reasons else "DeepSpeed and FSDP shard over several GPUs; add --engines megatron"
        return ConfigurationError(f"no layout works on --gpus {gpus}: {why}")
    needed = smallest.bytes / (1 - MARGIN) / GIB
    more = f"--gpus {enough}, on which one fits" if enough else "many more GPUs, a shorter sequence"
    return ConfigurationError(
        f"no layout of this model fits into {found.device.bytes / GIB:.1f} GiB on --gpus {gpus}: the one "
        f"that takes least, {_described(smallest, gpus)}, needs {smallest.bytes / GIB:.1f} GiB a GPU and so "
        f"one of {needed:.0f} GiB or more; take {more}, or larger GPUs"
    )


def _described(smallest: Smallest, gpus: int) -> str:
    layout = smallest.layout
    return f"{layout.describe(gpus)} with parallel.recompute={layout.recompute.name}"


def _fp8(config: RunConfig, efficiency: float) -> list[tuple[str, str]]:
    """What is reckoned of FP8, which no run of this project has measured."""
    if config.fp8.format is None:
        return []
    text = config.fp8.describe(config.model.num_layers)
    if config.cluster.fp8_peak_tflops is None:
        return [
            ("fp8", f"{text}; its peak is not stated (cluster.fp8_peak_tflops), and counted as that of bf16")
        ]
    saved = fp8_saving(config, peak_flops(config) * efficiency)
    return [("fp8", f"{text}, which are reckoned to take {saved:.0%} less time for it; not measured")]


def _head(search: Search, efficiency: float, *, with_gpus: bool) -> list[tuple[str, str]]:
    config = search.config
    stage, cluster = config.stage, config.cluster
    batch = f"{stage.global_batch_size} sequences a step of " if with_gpus else "sequences of "
    gpus = f"{search.world_size} GPUs, " if with_gpus else ""
    return [
        ("run", f"{batch}{stage.seq_length:,} tokens, {config.precision.value}"),
        *_fp8(config, efficiency),
        (
            "cluster",
            f"{gpus}{cluster.gpus_per_node} a node, {search.device.bytes / GIB:.1f} GiB, "
            f"{cluster.peak_tflops:g} TFLOP/s; a GPU sends {cluster.intra_node_gb_per_s:g} GB/s inside its "
            f"node and {cluster.inter_node_gb_per_s:g} to others",
        ),
        (
            "assumed",
            f"arithmetic at {efficiency:.0%} of the peak (--efficiency: your own); MFU counts the model's "
            "FLOPs without recomputation",
        ),
    ]


def _layouts(search: Search) -> list[str]:
    rows = [
        [
            "",
            "layout",
            "stages",
            "recompute",
            "micro",
            "GiB",
            "s a step",
            "tokens/s/GPU",
            "MFU",
            "bubble",
            "comm.",
        ]
    ]
    for number, found in enumerate(search.found, start=1):
        layout, time = found.layout, found.time
        rows.append(
            [
                str(number),
                layout.describe(search.world_size)
                + ("" if layout.distributed_optimizer else ", not sharded"),
                _stages(found),
                layout.recompute.name,
                str(layout.micro_batch_size),
                f"{found.plan.fullest.memory.total / GIB:.1f}",
                f"{time.seconds:.3g}" if time.seconds < 100 else f"{time.seconds:.0f}",
                f"{found.tokens_per_second_per_gpu:,.0f}",
                f"{time.mfu:.1%}",
                f"{time.bubble_share:.1%}",
                f"{time.communication_share:.1%}",
            ]
        )
    return table(rows, left=4)


def _stages(found: Found) -> str:
    """Layers of stages in few words: ``7``, ``7-8`` or ``8,8,7,5``."""
    if found.layout.pipeline == 1:
        return "-"
    if found.layout.stages is None:
        return f"even, {len(found.plan.stages[0].virtual_stages[0])}"
    stages = found.layout.stages
    return ",".join(map(str, stages)) if len(stages) <= 4 else f"{stages[0]},{stages[1]}..{stages[-1]}"


def _scaling(searches: Sequence[Search]) -> list[str]:
    rows = [["GPUs", "batch", "layout", "GiB", "tokens/s", "tokens/s/GPU", "MFU", "bubble", "comm."]]
    for each in searches:
        found = each.found[0]
        rows.append(
            [
                f"{each.world_size:,}",
                f"{each.config.stage.global_batch_size:,}",
                found.layout.describe(each.world_size),
                f"{found.plan.fullest.memory.total / GIB:.1f}",
                quantity(found.tokens_per_second_per_gpu * each.world_size),
                f"{found.tokens_per_second_per_gpu:,.0f}",
                f"{found.time.mfu:.1%}",
                f"{found.time.bubble_share:.1%}",
                f"{found.time.communication_share:.1%}",
            ]
        )
    return table(rows, left=3)


def _set_aside(search: Search, width: int) -> list[str]:
    lines = [
        f"{search.tried:,} layouts work. Set aside: {search.slower:,} that are slower than those listed, "
        "or slower forms of them, and"
    ]
    lines += [f"- {reason}" for reason in _reasons(search)[:_MOST_REASONS]]
    wrapped = []
    for line in lines:
        indent = "  " if line.startswith("- ") else ""
        wrapped += textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False)
    return wrapped if len(lines) > 1 else [line.replace(", and", "") for line in wrapped]


def _reasons(search: Search, besides: str | None = None) -> list[str]:
    """A sentence a reason, the most frequent first; ``besides`` is a group that is left out."""
    numbers = {group: n for group, n in search.rejections.number.items() if group != besides}
    return [
        f"{numbers[group]:,} x e.g. {search.rejections.example[group]}"
        for group in sorted(numbers, key=lambda group: -numbers[group])
    ]


def _values(found: Found) -> dict[str, Any]:
    layout, time = found.layout, found.time
    stages = found.plan.stages
    return {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "context": layout.context,
        "expert": layout.expert,
        "data": layout.replicas(found.plan.world_size),
        "virtual_stages": layout.virtual_stages,
        "layers_of_stages": [len(stage.layers) for stage in stages],
        "sequence_parallel": layout.sequence_parallel,
        "use_distributed_optimizer": layout.distributed_optimizer,
        "engine": layout.engine.name,
        "zero_stage": layout.zero or None,
        "reshard_after_forward": layout.fsdp == WEIGHTS_STAGE if layout.fsdp else None,
        "recompute": layout.recompute.name,
        "micro_batch_size": layout.micro_batch_size,
        "bytes": found.plan.fullest.memory.total,
        **{f"{name}_bytes": value for name, value in vars(found.plan.fullest.memory).items()},
        "seconds": time.seconds,
        "arithmetic_seconds": time.arithmetic,
        "recomputation_seconds": time.recomputation,
        "communication_seconds": time.communication,
        "bubble_seconds": time.bubble,
        "mfu": time.mfu,
        "bubble_share": time.bubble_share,
        "communication_share": time.communication_share,
        "tokens_per_second_per_gpu": found.tokens_per_second_per_gpu,
    }
