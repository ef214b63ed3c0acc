"""How much memory a rank's share of a run takes: exact for what has parameters, an estimate for activations.

Kernels' workspaces, communication buffers and fragmentation come on top. Pure Python: no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain_train.config.model import FeedForward, Mixer
from spikingbrain_train.config.parallel import Recompute
from spikingbrain_train.config.run import Precision, RunConfig, StageKind
from spikingbrain_train.parallel.costs import (
    branches,
    dense_twin,
    mixer_parameters,
    stage_layers,
    stage_parameters,
    stage_routed_expert_parameters,
    swapped_layers,
)

_FP32 = 4
_LOSS_CHUNK_BYTES = 1 << 30  # the fused output projection and loss hold at most so many logits (on a GPU)
_GLA_CHUNK_TOKENS = 64  # linear attention keeps one fp32 state per chunk for its backward pass


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


def bytes_per_element(precision: Precision) -> int:
    """Bytes of a weight or activation."""
    return 2 if precision is Precision.bf16 else _FP32


def optimizer_bytes(precision: Precision) -> int:
    """Bytes of optimizer state per trainable parameter."""
    return 3 * _FP32 if precision is Precision.bf16 else 2 * _FP32


def needs_teacher(config: RunConfig) -> bool:
    """Whether the stage learns from the dense source."""
    return config.stage.kind is StageKind.align or config.stage.distillation.weight > 0


@dataclass(frozen=True)
class Activations:
    """Bytes per token on one rank."""

    kept: float
    """From the forward pass to the backward pass."""
    recomputed: float = 0.0
    """Made again in the backward pass, for one layer at a time."""


def _mixer_activations(config: RunConfig, mixer: Mixer) -> float:
    """Bytes per token that a mixer keeps for its backward pass on one rank, its normed input left out."""
    model, parallel = config.model, config.parallel
    tensor, element = parallel.tensor_model_parallel_size, bytes_per_element(config.precision)
    heads, groups, width = model.num_attention_heads, model.num_query_groups, model.kv_channels
    total = 0.0
    for branch in branches(mixer):
        # q, k, v as projected; q and k once more after rotation or their feature map; the output.
        kept: float = ((heads + 2 * groups) + (heads + groups) + heads) * width * element
        if branch is Mixer.gla:
            kept += heads * width * element  # the output before its norm
            kept += 2 * groups * width * _FP32  # gate logits and log gate
            kept += groups * width * width * _FP32 / _GLA_CHUNK_TOKENS
        total += kept / tensor
    if mixer.is_parallel_hybrid:  # the output of each branch, before and after its norm
        total += 4 * model.hidden_size * element / (tensor if parallel.sequence_parallel else 1)
    return total


def _feed_forward_activations(config: RunConfig, feed_forward: FeedForward) -> Activations:
    """A layer's feed-forward without its normed input. Experts are taken to be evenly loaded."""
    model, parallel = config.model, config.parallel
    tensor, element = parallel.tensor_model_parallel_size, bytes_per_element(config.precision)
    if feed_forward is FeedForward.dense:
        return Activations(3 * model.ffn_hidden_size * element / tensor)
    moe, width = model.moe, model.expert_ffn_hidden_size
    visits: float = moe.router_topk
    if moe.capacity_factor is not None:
        visits *= moe.capacity_factor if moe.pad_to_capacity else min(1.0, moe.capacity_factor)
    # The tokens of a sequence are dealt to the tensor-parallel ranks; the experts' tensor ranks gather them.
    router = 2 * moe.num_experts * _FP32 / tensor  # logits and probabilities
    dispatched = visits * 2 * model.hidden_size * element * parallel.expert_tensor_size / tensor  # in and out
    activation = (visits + moe.num_shared_experts) * width * element / tensor
    matrices = 2 * activation  # gate and up
    everything = router + dispatched + activation + matrices
    recomputed = {
        Recompute.moe_activation: router + activation,
        Recompute.moe_feed_forward: router + activation + matrices,
        Recompute.moe_layer: everything,
    }.get(parallel.recompute, 0.0)
    return Activations(everything - recomputed, recomputed)


def _layer_activations(config: RunConfig, mixer: Mixer, feed_forward: FeedForward) -> Activations:
    """A whole layer: residuals and norms, the mixer, the feed-forward."""
    model, parallel = config.model, config.parallel
    shared_out = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    row = model.hidden_size * bytes_per_element(config.precision) / shared_out
    ffn = _feed_forward_activations(config, feed_forward)
    kept = 4 * row + _mixer_activations(config, mixer) + ffn.kept
    return (
        Activations(row, kept) if parallel.recompute is Recompute.full else Activations(kept, ffn.recomputed)
    )


def rank_tokens(config: RunConfig) -> float:
    """Tokens of a micro-batch on one rank, sinks included, before sequence parallelism."""
    tokens = config.stage.micro_batch_size * (config.stage.seq_length + config.model.num_sink_tokens)
    return tokens / config.parallel.context_parallel_size


def activation_bytes(config: RunConfig, stage: int, micro_batches: int) -> float:
    """Activations on a rank of pipeline stage ``stage``, under 1F1B."""
    model, parallel = config.model, config.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    element, tokens = bytes_per_element(config.precision), rank_tokens(config)
    layers = stage_layers(model, parallel, stage)
    mixers = [model.layer_mixers()[layer] for layer in layers]
    if config.stage.kind is StageKind.align:
        # Each swapped mixer runs forward and backward at once, between layers of the teacher, which keep
        # nothing: the largest counts, with its input, and its output and target in fp32.
        boundary = model.hidden_size * (element + 2 * _FP32)
        swapped = [mixer for mixer in mixers if mixer is not Mixer.full]
        return tokens * max((_mixer_activations(config, mixer) + boundary for mixer in swapped), default=0.0)
    feed_forwards = [model.layer_feed_forwards()[layer] for layer in layers]
    kinds = [_layer_activations(config, *kind) for kind in zip(mixers, feed_forwards, strict=True)]
    in_flight = min(stages - stage, micro_batches)
    total = tokens * (in_flight * sum(kind.kept for kind in kinds) + max(kind.recomputed for kind in kinds))
    if stage == stages - 1:
        rows = model.padded_vocab_size(tensor) / tensor
        # The logits of one chunk, which become their gradient; the gradients of projection and hidden states.
        total += min(tokens * rows * element, _LOSS_CHUNK_BYTES)
        total += (rows + tokens) * model.hidden_size * element
    return total


def trainable_parameters(config: RunConfig, stage: int) -> tuple[int, int]:
    """Parameters with a gradient on a rank of pipeline stage ``stage``, as (routed experts, all others)."""
    model, parallel = config.model, config.parallel
    if config.stage.kind is StageKind.cpt:
        experts = stage_routed_expert_parameters(model, parallel, stage)
        return experts, stage_parameters(model, parallel, stage) - experts
    mixers, layers = model.layer_mixers(), stage_layers(model, parallel, stage)
    swapped = [mixers[layer] for layer in swapped_layers(model) if layer in layers]
    return 0, sum(mixer_parameters(model, mixer, parallel) for mixer in swapped)


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
        gradients=sum(trainable_parameters(config, stage)) * _FP32,
        optimizer=_optimizer_share(config, stage, world_size) * optimizer_bytes(config.precision),
        activations=activation_bytes(config, stage, micro_batches),
        teacher=teacher * element,
    )
