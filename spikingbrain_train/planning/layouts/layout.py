"""One layout: the settings that the search varies, and how they become a run."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from spikingbrain_train.config.parallel import WEIGHTS_STAGE, EngineKind, ParallelConfig, Recompute
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.stage import StageConfig


@dataclass(frozen=True)
class Layout:
    """What the search varies. All else of a run stays as it is."""

    tensor: int
    pipeline: int
    context: int
    expert: int
    stages: tuple[int, ...] | None
    """Layers of each pipeline stage, virtual ones in the order of the model; None for even ones."""
    sequence_parallel: bool
    distributed_optimizer: bool
    recompute: Recompute
    micro_batch_size: int
    virtual_stages: int = 1
    """Pipeline stages of each rank, which an interleaved pipeline passes through in turn."""
    zero: int = 0
    """Stage of DeepSpeed's ZeRO; 0 for other engines."""
    fsdp: int = 0
    """The stage of ZeRO that FSDP shards as: 3 gathers weights again for the backward pass, 2 keeps them; 0
    for other engines."""

    @property
    def degrees(self) -> tuple[int, ...]:
        """Over how many ranks what is split."""
        return self.tensor, self.pipeline, self.context, self.expert

    @property
    def is_data_and_context_alone(self) -> bool:
        """Whether every rank has all layers, heads and experts: what DeepSpeed's engine asks for."""
        return self.tensor == self.pipeline == self.expert == 1

    @property
    def engine(self) -> EngineKind:
        """Who shards."""
        if self.fsdp:
            return EngineKind.fsdp
        return EngineKind.deepspeed if self.zero else EngineKind.megatron

    @property
    def split(self) -> tuple[Any, ...]:
        """What decides how weights and optimizer state lie; recomputation and micro-batches are the rest."""
        stages = (self.virtual_stages, self.stages)
        shards = self.distributed_optimizer, self.zero, self.fsdp
        return (*self.degrees, *stages, self.sequence_parallel, *shards)

    def is_laid_out_as(self, other: Layout) -> bool:
        """Whether nothing but micro-batches differs."""
        return self.recompute is other.recompute and self.split == other.split

    def parallel(self, base: ParallelConfig, world_size: int) -> ParallelConfig:
        """The section ``parallel`` with it; how mixers split a sequence stays as in ``base``.

        Gradients are always reduced while the backward pass runs. Weights are gathered while the forward pass
        runs where there is one stage: as all layouts of conf/parallel have it.
        """
        return replace(
            base,
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            virtual_pipeline_model_parallel_size=self.virtual_stages if self.virtual_stages > 1 else None,
            pipeline_model_parallel_layout=None if self.stages is None else list(self.stages),
            context_parallel_size=self.context,
            expert_model_parallel_size=self.expert,
            sequence_parallel=self.sequence_parallel,
            data_parallel_size=self.replicas(world_size),
            use_distributed_optimizer=self.distributed_optimizer,
            overlap_grad_reduce=self.engine is not EngineKind.fsdp
            and world_size > self.tensor * self.pipeline,
            overlap_param_gather=self.distributed_optimizer
            and self.pipeline == 1
            and self.engine is EngineKind.megatron,
            recompute=self.recompute,
            engine=self.engine,
            zero=replace(base.zero, stage=self.zero) if self.zero else base.zero,
            fsdp=replace(base.fsdp, reshard_after_forward=self.fsdp == WEIGHTS_STAGE)
            if self.fsdp
            else base.fsdp,
        )

    def replicas(self, world_size: int) -> int:
        """Data-parallel size."""
        return world_size // (self.tensor * self.pipeline * self.context)

    def run(self, base: RunConfig, world_size: int) -> RunConfig:
        """The run with it."""
        return Runs(base, world_size).of(self)

    def describe(self, world_size: int) -> str:
        """``DP 8 x PP 4, VPP 2, EP 8`` or ``DP 4 x TP 2, FSDP`` and so on, degrees of one left out."""
        degrees = [("DP", self.replicas(world_size)), ("TP", self.tensor), ("CP", self.context)]
        degrees.append(("PP", self.pipeline))
        words = " x ".join(f"{name} {degree}" for name, degree in degrees if degree > 1) or "one GPU"
        inside = (("VPP", self.virtual_stages), ("EP", self.expert))
        words = ", ".join([words, *(f"{name} {degree}" for name, degree in inside if degree > 1)])
        if self.fsdp:
            return f"{words}, FSDP" if self.fsdp == WEIGHTS_STAGE else f"{words}, FSDP that keeps weights"
        return f"{words}, ZeRO {self.zero}" if self.zero else words


class Runs:
    """The runs with layouts, which share the sections that they have in common.

    Args:
        base: the run that the layouts are for.
        world_size: GPUs.
    """

    def __init__(self, base: RunConfig, world_size: int) -> None:
        self._base, self._world_size = base, world_size
        self._stages: dict[int, StageConfig] = {}
        self._last: tuple[Layout, ParallelConfig] | None = None

    def of(self, layout: Layout) -> RunConfig:
        """The run with a layout; none of its sections may be changed in place."""
        size = layout.micro_batch_size
        if size not in self._stages:
            self._stages[size] = replace(self._base.stage, micro_batch_size=size)
        # Micro-batches are what varies first.
        if self._last is None or not layout.is_laid_out_as(self._last[0]):
            self._last = layout, layout.parallel(self._base.parallel, self._world_size)
        run = copy(self._base)  # a third of the time of replace(), for each of ten thousands
        run.parallel, run.stage = self._last[1], self._stages[size]
        return run
