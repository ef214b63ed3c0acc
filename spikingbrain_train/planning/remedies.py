"""What would make a run smaller: other settings, each planned anew. Pure Python: no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from spikingbrain_train.architecture.layers import unchanged_models
from spikingbrain_train.config.parallel import EngineKind, Recompute
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import SpikingBrainError
from spikingbrain_train.planning.checks import check_run_config
from spikingbrain_train.planning.fit import DeviceMemory, Fit
from spikingbrain_train.planning.planner import Plan, plan_run

_WORTH_SAYING = 0.98
"""What saves less than 2 % is no remedy."""
_MOST_TOGETHER = 4


@dataclass(frozen=True)
class Remedy:
    """Settings under which the run takes less memory."""

    settings: dict[str, Any]
    """By their dotted names, as they would be added to the command line."""
    plan: Plan
    """The run with them."""

    @property
    def needed(self) -> float:
        """Estimated bytes on the fullest rank."""
        return self.plan.fullest.memory.total

    def arguments(self) -> list[str]:
        """The settings as arguments of a command line."""
        return [f"{name}={_value(value)}" for name, value in self.settings.items()]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value.name if isinstance(value, Enum) else str(value)


@unchanged_models()
def remedies(plan: Plan, device: DeviceMemory) -> list[Remedy]:
    """Changes of one idea each, the one that leaves the fullest rank the least first.

    Of several values of the same settings only one is named: the mildest that fits, else the one that saves
    most. Nothing is named that the checks of a run refuse.
    """
    best: dict[tuple[str, ...], Remedy] = {}
    for settings in _ideas(plan):
        remedy = _with(plan, settings)
        if remedy is None or remedy.needed > _WORTH_SAYING * plan.fullest.memory.total:
            continue
        known = best.get(tuple(settings))
        if known is None or (device.fit(known.needed) is not Fit.fits and remedy.needed < known.needed):
            best[tuple(settings)] = remedy
    return sorted(best.values(), key=lambda remedy: remedy.needed)


@unchanged_models()
def together(found: list[Remedy], device: DeviceMemory) -> Remedy | None:
    """The remedies that save most, one on top of the other until all ranks fit; None where they never do.

    Args:
        found: what :func:`remedies` says of the run.
        device: what has to hold each rank.
    """
    settings: dict[str, Any] = {}
    for _ in range(_MOST_TOGETHER):
        if not found:
            return None
        settings |= found[0].settings
        plan = found[0].plan
        if device.fit(plan.fullest.memory.total) is Fit.fits:
            return Remedy(settings, plan)
        found = remedies(plan, device)
    return None


def _ideas(plan: Plan) -> Iterator[dict[str, Any]]:
    """Settings to try, milder values of the same ones first."""
    parallel, stage = plan.config.parallel, plan.config.stage
    for level in list(Recompute)[list(Recompute).index(parallel.recompute) + 1 :]:
        yield {"parallel.recompute": level}
    if not parallel.use_distributed_optimizer and parallel.engine is EngineKind.megatron:
        yield {"parallel.use_distributed_optimizer": True}
    if parallel.engine is EngineKind.megatron and plan.world_size > parallel.tensor_model_parallel_size:
        ahead = {"parallel.overlap_param_gather": False} if parallel.overlap_param_gather else {}
        yield {"parallel.engine": EngineKind.fsdp, **ahead}
    size = stage.micro_batch_size // 2
    while size >= 1:
        yield {"stage.micro_batch_size": size}
        size //= 2
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield {"parallel.sequence_parallel": True}
    for factor in (2, 4):
        tensor = factor * parallel.tensor_model_parallel_size
        yield {"parallel.tensor_model_parallel_size": tensor, "parallel.sequence_parallel": True}
        for degree in ("pipeline", "context", "expert"):
            name = "context_parallel_size" if degree == "context" else f"{degree}_model_parallel_size"
            yield {f"parallel.{name}": factor * getattr(parallel, name)}


def _with(plan: Plan, settings: dict[str, Any]) -> Remedy | None:
    """The run with other settings on as many ranks, or on the fewest more; None where it cannot be."""
    config = plan.config
    for name, value in settings.items():
        section, _, field = name.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    for world_size in (plan.world_size, 2 * plan.world_size, 4 * plan.world_size):
        replicas, rest = divmod(world_size, config.parallel.model_parallel_size)
        if rest or not replicas:
            continue
        said = dict(settings)
        if config.parallel.data_parallel_size not in (None, replicas):
            config = replace(config, parallel=replace(config.parallel, data_parallel_size=replicas))
            said["parallel.data_parallel_size"] = replicas
        if _is_valid(config, world_size):
            return Remedy(said, plan_run(config, world_size))
    return None


def _is_valid(config: RunConfig, world_size: int) -> bool:
    try:
        check_run_config(replace(config, dry_run=True, dry_run_rank=0), world_size)
    except SpikingBrainError:
        return False
    return True
