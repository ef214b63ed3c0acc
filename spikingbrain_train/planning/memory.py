"""How much memory a rank's share of a run takes: exact for what has parameters, an estimate for activations.

Kernels' workspaces, communication buffers and fragmentation come on top. Pure Python: no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain_train.architecture.layers import dense_twin, swapped_layers
from spikingbrain_train.architecture.sizes import FP32, bytes_per_element
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.planning.activations import activation_bytes
from spikingbrain_train.planning.costs import (
    mixer_parameters,
    stage_layers,
    stage_parameters,
    stage_routed_expert_parameters,
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank."""

    weights: float
    """Weights of the model in the run's precision."""
    gradients: float
    """fp32 gradient buffers of the trainable parameters."""
    optimizer: float
    """Two fp32 moments and, under bf16, fp32 main weights; a share of them with the distributed optimizer."""
    activations: float
    """Kept for the backward pass, for the micro-batches in flight; and the output projection's logits."""
    teacher: float
    """Weights of the dense source, in stages that learn from it."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.teacher


def optimizer_bytes(precision: Precision) -> int:
    """Bytes of optimizer state per trainable parameter."""
    return {Precision.bf16: 3 * FP32, Precision.fp32: 2 * FP32}[precision]


def needs_teacher(config: RunConfig) -> bool:
    """Whether the stage learns from the dense source."""
    return config.stage.kind.traits.needs_teacher or config.stage.distillation.weight > 0


def trainable_parameters(config: RunConfig, stage: int) -> tuple[int, int]:
    """Parameters with a gradient on a rank of pipeline stage ``stage``, as (routed experts, all others)."""
    model, parallel = config.model, config.parallel
    if config.stage.kind.traits.trains_all:
        experts = stage_routed_expert_parameters(model, parallel, stage)
        return experts, stage_parameters(model, parallel, stage) - experts
    here = stage_layers(model, parallel, stage)
    swapped = [layer for layer in swapped_layers(model) if layer in here]
    return 0, sum(mixer_parameters(model, layer, parallel) for layer in swapped)


def _optimizer_share(config: RunConfig, stage: int, world_size: int) -> float:
    """Parameters whose optimizer state a rank keeps.

    The distributed optimizer shards over the ranks that hold the same parameters: data x context ranks, and
    for routed experts those of the stage's ranks that expert parallelism leaves.
    """
    parallel, (experts, others) = config.parallel, trainable_parameters(config, stage)
    if not parallel.use_distributed_optimizer:
        return experts + others
    stage_ranks = world_size // parallel.pipeline_model_parallel_size
    expert_copies = stage_ranks // (parallel.expert_model_parallel_size * parallel.expert_tensor_size)
    return experts / expert_copies + others / (stage_ranks // parallel.tensor_model_parallel_size)


def estimate_memory(config: RunConfig, stage: int, world_size: int, micro_batches: int) -> MemoryEstimate:
    """What a rank of pipeline stage ``stage`` holds while it trains.

    Args:
        config: a checked run.
        stage: 0-based pipeline stage.
        world_size: ranks of the run.
        micro_batches: micro-batches of one optimizer step.
    """
    model, parallel, element = config.model, config.parallel, bytes_per_element(config.precision)
    teacher = stage_parameters(dense_twin(model), parallel, stage) if needs_teacher(config) else 0
    return MemoryEstimate(
        weights=stage_parameters(model, parallel, stage) * element,
        gradients=sum(trainable_parameters(config, stage)) * FP32,
        optimizer=_optimizer_share(config, stage, world_size) * optimizer_bytes(config.precision),
        activations=activation_bytes(config, stage, micro_batches),
        teacher=teacher * element,
    )
