"""What a run asks of the machine that it starts on, against what is there. Pure Python: no torch."""

from __future__ import annotations

from spikingbrain_train.config.parallel import AcceleratorKind
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.interfaces import check_interfaces
from spikingbrain_train.planning.launch import Launch, available_cores, has_gpu_device, memory_limit
from spikingbrain_train.planning.memory import GIB
from spikingbrain_train.planning.memory_copies import check_room
from spikingbrain_train.planning.planner import Plan, StagePlan

LOADERS_PER_CORE = 4
"""Loader processes that share a core at most; more only wait for each other."""
_FEW_LOADERS = 8
"""As many may always be asked for, however small the machine."""
_ACTIVATION_SLACK = 2
"""Activations are an estimate: only what exceeds the memory this many times is refused on their account."""


def check_host(plan: Plan, launch: Launch) -> None:
    """Refuse a run that this machine cannot hold, before anything is allocated.

    Raises:
        ConfigurationError: names what is needed, what is there, and the settings that lower the need.
        PlatformError: a variable names a network interface that is not there.
    """
    check_interfaces(not _is_on_cpu(plan))
    _check_loaders(plan, launch)
    _check_memory(plan, launch)
    stages = _stages_here(plan, launch)
    kept = sum(stage.memory.weights + stage.memory.optimizer for stage in stages)
    own = sum(stage.memory.total - stage.memory.activations for stage in stages) if _is_on_cpu(plan) else 0.0
    check_room(plan.config, kept, plan.world_size, launch.local_world_size, beside=own)


def _check_loaders(plan: Plan, launch: Launch) -> None:
    workers, ranks, cores = plan.config.data.num_workers, launch.local_world_size, available_cores()
    most = max(_FEW_LOADERS, LOADERS_PER_CORE * cores // ranks)
    if workers > most:
        raise ConfigurationError(
            f"data.num_workers={workers} starts {workers * ranks:,} loader processes on {cores} cores; "
            f"use at most {most} a rank on this machine"
        )


def _check_memory(plan: Plan, launch: Launch) -> None:
    limit = memory_limit()
    if not _is_on_cpu(plan) or limit is None:
        return
    stages = _stages_here(plan, launch)
    whole = sum(stage.memory.total for stage in stages)
    activations = sum(stage.memory.activations for stage in stages)
    for needed, allowed, what, advice in (
        (
            whole - activations,
            limit,
            f"{sum(stage.parameters for stage in stages):,} parameters on {len(stages)} rank(s) with their "
            "gradients and optimizer state",
            "choose a smaller model (see the sizes under model), or spread it over more machines",
        ),
        (
            whole,
            limit * _ACTIVATION_SLACK,
            f"the tensors of a step with stage.micro_batch_size={plan.config.stage.micro_batch_size} and "
            f"stage.seq_length={plan.config.stage.seq_length}",
            "lower them, or set parallel.recompute=full",
        ),
    ):
        if needed > allowed:
            raise ConfigurationError(
                f"{what} take about {needed / GIB:,.1f} GiB, but this machine has {limit / GIB:,.1f} GiB of "
                f"memory; {advice}"
            )


def _is_on_cpu(plan: Plan) -> bool:
    accelerator = plan.config.cluster.accelerator
    return accelerator is AcceleratorKind.cpu or (
        accelerator is AcceleratorKind.auto and not has_gpu_device()
    )


def _stages_here(plan: Plan, launch: Launch) -> list[StagePlan]:
    """The pipeline stage of every rank on this machine; megatron-core fills stage after stage with ranks.

    A machine's ranks count on from its first one's.
    """
    first = max(0, launch.rank - launch.local_rank)
    ranks = range(first, min(first + launch.local_world_size, plan.world_size))
    return [plan.stages[rank * len(plan.stages) // plan.world_size] for rank in ranks]
