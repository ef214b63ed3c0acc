"""The plan of a run before it starts: who holds which layers, how much memory and work that takes.

Parameters are exact; memory is an estimate of tensors that live at the same time (kernels' workspaces,
communication buffers and fragmentation come on top). What a plan looks like to people and programs is said in
plan_report/. Pure Python: no torch.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path

from spikingbrain_train.architecture.layers import (
    Layer,
)
from spikingbrain_train.architecture.sizes import FP32, bytes_per_element
from spikingbrain_train.architecture.weights import ONE_RANK
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import OptimizerKind, RunConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.costs import (
    layers_of_stage,
    stage_parameters,
    total_parameters,
    virtual_stage_layers,
)
from spikingbrain_train.planning.data_position import samples_of
from spikingbrain_train.planning.memory import (
    MemoryEstimate,
    estimate_memory,
    optimizer_bytes,
)
from spikingbrain_train.planning.precision import PrecisionChoice, expected_precision
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.reporting.quantities import size


def smallest_stage(parallel: ParallelConfig) -> int:
    """The fewest ranks of a pipeline stage in which every degree but data parallelism is whole.

    Tensor x context and expert tensor x expert model parallelism are two layouts of the same ranks.
    """
    dense = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return lcm(dense, parallel.expert_tensor_size * parallel.expert_model_parallel_size)


def launched_world_size(config: RunConfig) -> int:
    """The number of ranks: the launcher's WORLD_SIZE; without one, 1.

    A dry run without a launcher plans for parallel.data_parallel_size copies of the model; if that is null,
    for as few as the degrees allow.

    Raises:
        ConfigurationError: WORLD_SIZE is not a positive number.
    """
    launched = os.environ.get("WORLD_SIZE")
    if launched is None:
        parallel = config.parallel
        if not config.dry_run:
            return 1
        if parallel.data_parallel_size is None:
            return smallest_stage(parallel) * parallel.pipeline_model_parallel_size
        return parallel.data_parallel_size * parallel.model_parallel_size
    if not launched.isdecimal() or int(launched) < 1:
        raise ConfigurationError(
            f"the environment variable WORLD_SIZE={launched} is not a positive number; "
            f"start ranks with --nproc-per-node, or unset it"
        )
    return int(launched)


def pipeline_bubble(stages: int, micro_batches: int, virtual_stages: int = 1) -> float:
    """Share of a step that 1F1B leaves a rank idle: (p - 1) / (v m + p - 1), with v virtual stages a rank.

    The bubble takes p - 1 times forward and backward of one (virtual) stage (arXiv 2104.04473, section 2.2).
    """
    return (stages - 1) / (virtual_stages * micro_batches + stages - 1)


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage, as each of its ranks sees it."""

    virtual_stages: list[range]
    """Layers of each of its virtual stages; of one that is no virtual one, all."""
    kinds: list[Layer]
    """What each of its layers is, in order."""
    parameters: int
    """Parameters on one rank."""
    memory: MemoryEstimate

    @property
    def layers(self) -> list[int]:
        """All its layers, in order."""
        return [layer for layers in self.virtual_stages for layer in layers]


def _plan_stage(config: RunConfig, stage: int, world_size: int, micro_batches: int) -> StagePlan:
    model = config.model
    return StagePlan(
        virtual_stages=virtual_stage_layers(model, config.parallel, stage),
        kinds=layers_of_stage(model, config.parallel, stage),
        parameters=stage_parameters(model, config.parallel, stage),
        memory=estimate_memory(config, stage, world_size, micro_batches),
    )


@dataclass(frozen=True)
class Plan:
    """What a run will do; ``plan_report.report.render`` makes text of it."""

    config: RunConfig
    """The run; its precision is never ``auto``."""
    precision: PrecisionChoice
    """Why it has that precision."""
    world_size: int
    stages: list[StagePlan]
    flops_per_token: float
    """Model FLOPs of training one token, forward and backward."""
    start_flops: float
    """Model FLOPs of what comes before the first step."""

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model."""
        return self.world_size // self.config.parallel.model_parallel_size

    @property
    def micro_batches(self) -> int:
        """Micro-batches that each replica accumulates in one optimizer step."""
        stage = self.config.stage
        return stage.global_batch_size // (stage.micro_batch_size * self.data_parallel_size)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.config.stage.global_batch_size * self.config.stage.seq_length

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole stage, those before a resume included."""
        return samples_of(self.config) * self.config.stage.seq_length

    @property
    def total_flops(self) -> float:
        """FLOPs of the whole stage."""
        tokens = self.total_tokens if self.config.stage.train_iters else 0
        return self.start_flops + self.flops_per_token * tokens

    @property
    def pipeline_bubble(self) -> float:
        """Share of a step that the pipeline leaves a rank idle."""
        return pipeline_bubble(len(self.stages), self.micro_batches, self.config.parallel.virtual_stages)

    @property
    def fullest(self) -> StagePlan:
        """The stage whose ranks need the most memory."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint: weights and optimizer state."""
        model, precision, kind = self.config.model, self.config.precision, kind_of(self.config.stage)
        state = kind.trainable_parameters_in_all(model) * optimizer_bytes(precision)
        if self.config.optimizer.kind is OptimizerKind.muon:
            state -= sum(kind.trainable_matrices(replace(self.config, parallel=ONE_RANK), 0)) * FP32
        return total_parameters(model) * bytes_per_element(precision) + state


def plan_run(config: RunConfig, world_size: int) -> Plan:
    """Lay a checked run out over ``world_size`` ranks (planning.checks.check_run_config has accepted it).

    Raises:
        CheckpointError: a checkpoint of this run, whose precision it would keep, is damaged.
    """
    precision = expected_precision(config)
    config = replace(config, precision=precision.precision)
    replicas = world_size // config.parallel.model_parallel_size
    micro_batches = config.stage.global_batch_size // (config.stage.micro_batch_size * replicas)
    return Plan(
        config=config,
        precision=precision,
        world_size=world_size,
        stages=[
            _plan_stage(config, stage, world_size, micro_batches)
            for stage in range(config.parallel.pipeline_model_parallel_size)
        ],
        flops_per_token=kind_of(config.stage).flops_per_token(config),
        start_flops=kind_of(config.stage).start_flops(config),
    )


def check_disk_space(plan: Plan) -> None:
    """At least one checkpoint fits where the run will write it.

    Raises:
        ConfigurationError: naming output_dir, what is free and what is needed.
    """
    nearest = Path(os.path.abspath(plan.config.output_dir))
    while not nearest.exists():
        nearest = nearest.parent
    free = shutil.disk_usage(nearest).free
    if free < plan.checkpoint_bytes:
        raise ConfigurationError(
            f"output_dir={plan.config.output_dir} has {size(free)} of free space, but one "
            f"checkpoint of this run takes {size(plan.checkpoint_bytes)}; free some or choose another folder"
        )
