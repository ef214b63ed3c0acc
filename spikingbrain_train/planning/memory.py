"""How much memory a rank's share of a run takes: exact for what has parameters, an estimate for activations.

Kernels' workspaces, communication buffers and fragmentation come on top. Pure Python: no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain_train.architecture.layers import dense_source, layers, swapped_layers
from spikingbrain_train.architecture.sizes import FP32, bytes_per_element
from spikingbrain_train.config.parallel import REDUCE_BUCKET, WEIGHTS_STAGE, EngineKind
from spikingbrain_train.config.run import OptimizerKind, Precision, RunConfig
from spikingbrain_train.planning.costs import (
    layer_parameters,
    mixer_parameters,
    parameters_around,
    stage_parameters,
)
from spikingbrain_train.planning.stages.registry import kind_of

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank."""

    weights: float
    """Weights of the model in the run's precision; with ZeRO 3 a share of them and what is gathered."""
    gradients: float
    """fp32 gradient buffers of the trainable parameters; with ZeRO 2 a share of them and a bucket."""
    optimizer: float
    """Two fp32 moments, or Muon's momentum, and, under bf16, fp32 main weights; a share of them with the
    distributed optimizer or ZeRO, which keeps main weights of fp32 runs, too, and none of it here where it is
    offloaded."""
    activations: float
    """Kept for the backward pass, for the micro-batches in flight; what the backward pass of one layer holds
    beside that; and the output projection's logits."""
    teacher: float
    """Weights of the dense source, in stages that learn from it."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.teacher


def optimizer_bytes(precision: Precision) -> int:
    """Bytes of AdamW's state per trainable parameter; Muon has a moment less."""
    return {Precision.bf16: 3 * FP32, Precision.fp32: 2 * FP32}[precision]


def _share(config: RunConfig, parameters: tuple[int, int], world_size: int) -> float:
    """Of (routed experts, other) parameters of a rank those whose optimizer state it keeps.

    The distributed optimizer shards over the ranks that hold the same parameters: data x context ranks, and
    for routed experts those of the stage's ranks that expert parallelism leaves. So does DeepSpeed's ZeRO.
    """
    parallel = config.parallel
    experts, others = parameters
    if parallel.engine is EngineKind.deepspeed:
        return (experts + others) / world_size
    if not parallel.use_distributed_optimizer:
        return experts + others
    stage_ranks = world_size // parallel.pipeline_model_parallel_size
    expert_copies = stage_ranks // (parallel.expert_model_parallel_size * parallel.expert_tensor_size)
    return experts / expert_copies + others / (stage_ranks // parallel.tensor_model_parallel_size)


def _of_zero(config: RunConfig, stage: int, world_size: int) -> tuple[float, float]:
    """Bytes of optimizer state and of gradients under DeepSpeed, which keeps main weights in fp32 runs, too.

    ZeRO 2 keeps fp32 sums of a share, and a bucket of gradients on their way; ZeRO 3's is of fp32 and
    copied once, part by part of the ranks.
    What is offloaded is not on the device; its plan counts the host's memory nowhere.
    """
    zero = config.parallel.zero
    trainable = kind_of(config.stage).trainable_parameters(config, stage)
    share, whole = _share(config, trainable, world_size), sum(trainable)
    state = 0.0 if zero.offload_optimizer else share * 3 * FP32
    if zero.stage == 1:
        return state, whole * FP32
    per_gradient = 2 * FP32 if zero.stage == WEIGHTS_STAGE else bytes_per_element(config.precision)
    bucket = min(whole, REDUCE_BUCKET) * per_gradient
    return state, bucket + (0.0 if zero.offload_optimizer else share * FP32)


@dataclass(frozen=True)
class _Units:
    """Parameters that a rank under FSDP gathers and reduces together."""

    whole: float
    """Of the model, what no unit has."""
    around: float
    """Of the unit around the layers, which is gathered as long as any layer is."""
    largest: float
    """Of the largest other one."""


def _units(config: RunConfig) -> _Units:
    """An align stage trains each mixer by itself: these are units, and all else is whole."""
    model, parallel = config.model, config.parallel
    kind = kind_of(config.stage)
    if kind.trains_mixers:
        trained = sum(kind.trainable_parameters(config, 0))
        swapped = swapped_layers(layers(model))
        mixers = [mixer_parameters(model, layer, parallel) for layer in swapped]
        return _Units(stage_parameters(model, parallel, 0) - trained, 0, max(mixers, default=trained))
    largest = max(layer_parameters(model, layer, parallel) for layer in layers(model))
    return _Units(0, parameters_around(model, parallel, 0), largest)


def _of_fsdp(config: RunConfig, world_size: int, activations: float) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer state under FSDP.

    Of weights a share, in fp32 where they train, and what is gathered: the unit around the layers and two
    layers, or all. Of gradients a share in fp32, those of the unit around the layers, which wait for the end
    of the backward pass, and those of a layer on their way, in fp32, too; or those of that unit on their way,
    where that is more than the activations that are gone by then.
    """
    model, parallel, element = config.model, config.parallel, bytes_per_element(config.precision)
    units = _units(config)
    trained = sum(kind_of(config.stage).trainable_parameters(config, 0))
    parameters = stage_parameters(model, parallel, 0)
    ranks = world_size // parallel.tensor_model_parallel_size
    gathered = units.around + 2 * units.largest
    if not parallel.fsdp.reshard_after_forward:
        gathered = parameters - units.whole
    frozen = parameters - units.whole - trained
    weights = (units.whole + frozen / ranks + gathered) * element
    main = trained * FP32 / ranks
    on_their_way = units.around * element + units.largest * (element + FP32)
    on_their_way = max(on_their_way, units.around * (element + FP32) - activations)
    return weights + main, trained * FP32 / ranks + on_their_way, 2 * trained * FP32 / ranks


def estimate_memory(config: RunConfig, stage: int, world_size: int, micro_batches: int) -> MemoryEstimate:
    """What a rank of pipeline stage ``stage`` holds while it trains.

    Args:
        config: a checked run.
        stage: 0-based pipeline stage.
        world_size: ranks of the run.
        micro_batches: micro-batches of one optimizer step.
    """
    model, parallel, element = config.model, config.parallel, bytes_per_element(config.precision)
    kind = kind_of(config.stage)
    has_teacher = kind.needs_teacher(config.stage)
    trainable = kind.trainable_parameters(config, stage)
    optimizer = _share(config, trainable, world_size) * optimizer_bytes(config.precision)
    if config.optimizer.kind is OptimizerKind.muon:
        optimizer -= _share(config, kind.trainable_matrices(config, stage), world_size) * FP32
    gradients: float = sum(trainable) * FP32
    if parallel.engine is EngineKind.deepspeed:
        optimizer, gradients = _of_zero(config, stage, world_size)
    teacher = stage_parameters(dense_source(model), parallel, stage) if has_teacher else 0
    weights: float = stage_parameters(model, parallel, stage)
    activations = kind.activation_bytes(config, stage, micro_batches)
    if parallel.engine is EngineKind.fsdp:
        of_weights, gradients, optimizer = _of_fsdp(config, world_size, activations)
        weights = of_weights / element
    elif parallel.engine is EngineKind.deepspeed and parallel.zero.stage == WEIGHTS_STAGE:
        output = model.padded_vocab_size(1) * model.hidden_size  # stays gathered, others are in passing
        weights = weights / world_size + min(weights, output + REDUCE_BUCKET)
    return MemoryEstimate(
        weights=weights * element,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        teacher=teacher * element,
    )
