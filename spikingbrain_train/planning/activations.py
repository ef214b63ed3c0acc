"""What a rank keeps between the forward and the backward pass, by kind of layer. Pure Python: no torch.

An inventory of the tensors that autograd holds on to, so that tests can compare it with what it really holds;
masks, indices and other small change are left out. On GPUs torch's fused RMSNorm is assumed, which keeps its
input (without one, before torch 2.8, another 4 bytes of every normed number are kept).

Letters as in :mod:`~spikingbrain_train.planning.costs`, heads and groups being those of a tensor-parallel
rank; n context-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from spikingbrain_train.architecture.head_shares import head_shares
from spikingbrain_train.config.kinds import of_kind
from spikingbrain_train.config.model import FeedForward, Mixer, SpikingProjection
from spikingbrain_train.config.parallel import (
    AcceleratorKind,
    LinearAttentionBackend,
    LinearAttentionContextParallel,
    Recompute,
    SlidingWindowContextParallel,
)
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.planning.costs import stage_layers

FP32 = 4
_LOSS_CHUNK_BYTES = 1 << 30  # the fused output projection and loss hold at most so many logits (on a GPU)
_FLA_CHUNK_TOKENS = 64
_CHUNK_SEGMENT_ELEMENTS = 1 << 20  # ops/gated_linear_attention/chunk.py keeps a state per so many of q


def bytes_per_element(precision: Precision) -> int:
    """Bytes of a weight or activation."""
    return {Precision.bf16: 2, Precision.fp32: FP32}[precision]


@dataclass(frozen=True)
class Activations:
    """Bytes per token on one rank."""

    kept: float
    """From the forward pass to the backward pass."""
    recomputed: float = 0.0
    """Made again in the backward pass, for one layer at a time."""


def rank_tokens(config: RunConfig) -> float:
    """Tokens of a micro-batch on one rank, sinks included, before sequence parallelism."""
    tokens = config.stage.micro_batch_size * (config.stage.seq_length + config.model.num_sink_tokens)
    return tokens / config.parallel.context_parallel_size


def repeats_groups(config: RunConfig) -> bool:
    """Whether linear attention runs on flash-linear-attention, whose kernels know no groups and keep keys,
    values and gates of every head. Without knowing what is installed: everywhere but on CPUs.
    """
    cluster = config.cluster
    if cluster.kernels.gated_linear_attention is LinearAttentionBackend.auto:
        return cluster.accelerator is not AcceleratorKind.cpu
    return cluster.kernels.gated_linear_attention is LinearAttentionBackend.fla


def _heads_and_groups(config: RunConfig) -> tuple[int, int]:
    """Of a tensor-parallel rank."""
    tensor = config.parallel.tensor_model_parallel_size
    return config.model.num_attention_heads // tensor, config.model.num_query_groups // tensor


def _ulysses_heads_and_groups(config: RunConfig) -> tuple[int, int]:
    """Of the rank with the largest share: its heads and groups of whole sequences, counted per token of a
    slice.
    """
    ranks = config.parallel.context_parallel_size
    shares = head_shares(*_heads_and_groups(config), ranks)
    return (
        ranks * max(len(share.heads) for share in shares),
        ranks * max(len(share.groups) for share in shares),
    )


def _softmax_branch(config: RunConfig, branch: Mixer) -> float:
    """Bytes per token that full or sliding-window attention keeps, its normed input left out."""
    model, parallel = config.model, config.parallel
    heads, groups = _heads_and_groups(config)
    width = model.kv_channels * bytes_per_element(config.precision)
    method = parallel.context_parallel.sliding_window_attention
    uses_ulysses = parallel.context_parallel_size > 1 and (
        branch is Mixer.full or method is SlidingWindowContextParallel.ulysses
    )
    if parallel.context_parallel_size == 1:
        # The fused projection, of which values are a view; queries and keys after rotation; the output.
        kept: float = (heads + 2 * groups) + (heads + groups) + heads
    elif uses_ulysses:
        # Queries, keys and values of whole sequences, the output there, and the output that came back.
        share, of_groups = _ulysses_heads_and_groups(config)
        kept = (share + 2 * of_groups) + share + heads
    else:
        # Queries; keys and values with those of the halo and the sinks; the output.
        more = (model.sliding_window + model.num_sink_tokens) * config.stage.micro_batch_size
        kept = heads + 2 * groups * (1 + more / rank_tokens(config)) + heads
        if model.num_sink_tokens:
            kept += 2 * groups  # of the first rank: what the sinks see
    if model.num_sink_tokens and not uses_ulysses:
        kept += heads  # of the first rank: the text's output, and once more behind that of the sinks
    if model.qk_layernorm:
        kept += heads  # queries before their norm
    kept += 4  # cosines and sines in the activations' dtype, of queries and of keys
    if SpikingProjection.attention_output in model.spiking.projections and not model.num_sink_tokens:
        kept += heads  # the output, encoded
    return kept * width + heads * FP32  # one sum of exponentials a head


def _linear_branch(config: RunConfig) -> float:
    """Bytes per token that gated linear attention keeps, its normed input left out."""
    model, parallel = config.model, config.parallel
    heads, groups = _heads_and_groups(config)
    element, rows = bytes_per_element(config.precision), config.stage.micro_batch_size
    width, fp32_width = model.kv_channels * element, model.kv_channels * FP32
    state = groups * model.kv_channels * fp32_width * rows
    states = heads * model.kv_channels / _CHUNK_SEGMENT_ELEMENTS  # per token, of the chunked form
    # Features of queries and keys; the output before and after its norm, and one number a head for that.
    kept: float = (heads + groups + 2 * heads) * width + heads * FP32
    # What the gate's sigmoid sees; on CPUs torch keeps a second tensor for its gradient.
    kept += groups * fp32_width * (2 if config.cluster.accelerator is AcceleratorKind.cpu else 1)
    if model.gla.gate.has_parameters:
        kept += model.gla.gate_low_rank_dim * element
    if model.qk_layernorm:
        kept += heads * width
    method, ranks = parallel.context_parallel.gated_linear_attention, parallel.context_parallel_size
    has_copies = rows > 1  # of queries, which the kernel wants token by token in every row
    if ranks > 1 and method is LinearAttentionContextParallel.ulysses:
        heads, groups = _ulysses_heads_and_groups(config)
        has_copies = True
    elif ranks > 1:
        # What makes the state that the slice hands over: keys, values and decays in float32. States of ranks.
        kept += 4 * groups * fp32_width + (ranks + 1) * state / rank_tokens(config)
        if method is LinearAttentionContextParallel.allscan:
            # What reads the state before the slice: queries times their decay, and the decay.
            kept += heads * width + 2 * groups * fp32_width
    if repeats_groups(config):
        # Keys and values of every head; float32 sums of gates; float32 scores inside chunks.
        kept += heads * (2 * width + fp32_width + _FLA_CHUNK_TOKENS * FP32)
        return kept + heads * width if has_copies else kept
    # The fused projection, of which values are a view (what Ulysses received); the log gate; some states.
    kept += (heads + 2 * groups) * width + groups * fp32_width
    return kept + states * state


_BRANCHES: dict[Mixer, Callable[[RunConfig], float]] = {
    Mixer.full: partial(_softmax_branch, branch=Mixer.full),
    Mixer.swa: partial(_softmax_branch, branch=Mixer.swa),
    Mixer.gla: _linear_branch,
}


def mixer_activations(config: RunConfig, mixer: Mixer) -> float:
    """Bytes per token that a mixer keeps for its backward pass on one rank, its normed input left out."""
    model, parallel = config.model, config.parallel
    shared_out = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    row = model.hidden_size * bytes_per_element(config.precision) / shared_out
    kinds = mixer.branches
    total = sum(of_kind(kind, _BRANCHES, "the activations of an attention")(config) for kind in kinds)
    if mixer.is_parallel_hybrid:  # the output of each branch, before and after its norm
        total += 4 * row
    # What reads spikes keeps its own encoded input; the first of these stands for the normed input.
    spikes, low_rank = model.spiking.projections, Mixer.gla in kinds and model.gla.gate.has_parameters
    readers = len(kinds) * (SpikingProjection.qkv in spikes) + low_rank * (SpikingProjection.gate in spikes)
    if readers:
        unencoded = SpikingProjection.qkv not in spikes or (low_rank and SpikingProjection.gate not in spikes)
        total += (readers + unencoded - 1) * row
    return total


def _feed_forward_activations(config: RunConfig, feed_forward: FeedForward) -> Activations:
    """A layer's feed-forward without its normed input."""
    kinds = {FeedForward.dense: _dense_feed_forward, FeedForward.moe: _experts}
    return of_kind(feed_forward, kinds, "the activations of a feed-forward")(config)


def _dense_feed_forward(config: RunConfig) -> Activations:
    # Gate, up and their product.
    element, tensor = bytes_per_element(config.precision), config.parallel.tensor_model_parallel_size
    dense = 3 * config.model.ffn_hidden_size * element / tensor
    again = config.parallel.recompute in (Recompute.moe_feed_forward, Recompute.moe_layer)
    return Activations(0.0, dense) if again else Activations(dense)


def _experts(config: RunConfig) -> Activations:
    """Experts are taken to be evenly loaded."""
    model, parallel = config.model, config.parallel
    tensor, element = parallel.tensor_model_parallel_size, bytes_per_element(config.precision)
    moe, width = model.moe, model.expert_ffn_hidden_size
    visits: float = moe.router_topk
    if moe.capacity_factor is not None:
        visits *= moe.capacity_factor if moe.pad_to_capacity else min(1.0, moe.capacity_factor)
    # The tokens of a sequence are dealt to the tensor-parallel ranks; the experts' tensor ranks gather them.
    router = 3 * moe.num_experts * FP32 / tensor  # logits, probabilities and their choice
    row = model.hidden_size * element / tensor
    dispatched = visits * row * parallel.expert_tensor_size  # what the experts read
    activation = (visits + moe.num_shared_experts) * width * element / tensor
    matrices = 2 * activation  # gate and up
    encoded = 0.0
    if moe.num_shared_experts and SpikingProjection.mlp_fc1 in model.spiking.projections:
        encoded = row if parallel.sequence_parallel else row * tensor  # what the shared expert reads
    everything = router + dispatched + activation + matrices + encoded
    spikes = SpikingProjection.mlp_fc2 in model.spiking.projections  # what fc2 keeps is not the activation
    levels = {
        Recompute.none: 0.0,
        Recompute.full: 0.0,  # with the whole layer
        Recompute.moe_activation: router + (0.0 if spikes else activation),
        Recompute.moe_feed_forward: router + activation + matrices + encoded,
        Recompute.moe_layer: everything,
    }
    recomputed = of_kind(parallel.recompute, levels, "the activations of experts")
    return Activations(everything - recomputed, recomputed)


def layer_activations(config: RunConfig, mixer: Mixer, feed_forward: FeedForward) -> Activations:
    """A whole layer: residuals and norms, the mixer, the feed-forward."""
    model, parallel = config.model, config.parallel
    shared_out = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    row = model.hidden_size * bytes_per_element(config.precision) / shared_out
    ffn = _feed_forward_activations(config, feed_forward)
    # The residual in front of mixer and feed-forward, and what either norm makes of it.
    kept = 4 * row + mixer_activations(config, mixer) + ffn.kept
    if parallel.recompute is Recompute.full:
        return Activations(row, kept + ffn.recomputed)
    return Activations(kept, ffn.recomputed)


def activation_bytes(config: RunConfig, stage: int, micro_batches: int) -> float:
    """Activations on a rank of pipeline stage ``stage``, under 1F1B."""
    model, parallel = config.model, config.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    element, tokens = bytes_per_element(config.precision), rank_tokens(config)
    layers = stage_layers(model, parallel, stage)
    mixers = [model.layer_mixers()[layer] for layer in layers]
    if not config.stage.kind.traits.trains_all:
        # Each swapped mixer runs forward and backward at once, between layers of the teacher, which keep
        # nothing: the largest counts, with its input, and its output and target in fp32.
        boundary = model.hidden_size * (element + 2 * FP32)
        swapped = [mixer for mixer in mixers if mixer is not Mixer.full]
        return tokens * max((mixer_activations(config, mixer) + boundary for mixer in swapped), default=0.0)
    feed_forwards = [model.layer_feed_forwards()[layer] for layer in layers]
    kinds = [layer_activations(config, *kind) for kind in zip(mixers, feed_forwards, strict=True)]
    in_flight = min(stages - stage, micro_batches)
    # The last layer's output goes to the next stage, or is what the final norm keeps.
    row = model.hidden_size * element / (tensor if parallel.sequence_parallel else 1)
    kept = row + model.kv_channels * FP32 + sum(kind.kept for kind in kinds)  # and rotary angles
    total = tokens * (in_flight * kept + max(kind.recomputed for kind in kinds))
    if stage == stages - 1:
        rows = model.padded_vocab_size(tensor) / tensor
        # The logits of one chunk, which become their gradient; the gradients of projection and hidden states.
        total += min(tokens * rows * element, _LOSS_CHUNK_BYTES)
        total += (rows + tokens) * model.hidden_size * element
    return total
