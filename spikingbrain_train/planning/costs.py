"""What a model costs in parameters and arithmetic, from its config alone. Pure Python: no torch.

Letters: h hidden_size, f width of a feed-forward or expert, H query heads, G query groups, d kv_channels, r
gate_low_rank_dim, E experts, V vocabulary, T tokens of text in a sequence, S sinks in front of them, t
tensor-parallel degree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from spikingbrain_train.config.kinds import of_kind
from spikingbrain_train.config.model import FeedForward, GateKind, Mixer, ModelConfig, SpikingConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig, StageKind

ONE_RANK = ParallelConfig()
"""The layout in which one rank holds the whole model."""


def dense_twin(model: ModelConfig) -> ModelConfig:
    """The dense source that teaches it: full attention and one feed-forward in every layer, no sinks, no
    spikes.
    """
    return dataclasses.replace(
        model,
        mixers=[Mixer.full],
        feed_forwards=[FeedForward.dense],
        num_sink_tokens=0,
        spiking=SpikingConfig(),
    )


def swapped_layers(model: ModelConfig) -> list[int]:
    """Layers (0-based) whose mixer is not the dense source's; the alignment stage trains their mixers."""
    return [layer for layer, mixer in enumerate(model.layer_mixers()) if mixer is not Mixer.full]


def qkv_matrix(model: ModelConfig) -> int:
    """Elements of the fused q, k and v projection of one branch: (H + 2G) d h."""
    return (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels * model.hidden_size


def output_matrix(model: ModelConfig) -> int:
    """Elements of the output projection of one branch: H d h."""
    return model.num_attention_heads * model.kv_channels * model.hidden_size


def new_mixer_parameters(model: ModelConfig, mixer: Mixer, parallel: ParallelConfig = ONE_RANK) -> int:
    """Parameters of one mixer that its dense source does not have, on one rank.

    Linear branch: its output norm (d) and a low-rank gate's down projection (r h) are on every rank, the
    gate's up projection (G d r) and bias (G d) are split; a tied gate has none. Two branches: a norm of each
    (2 h) and their weights (2).
    """
    new = 2 * model.hidden_size + 2 if mixer.is_parallel_hybrid else 0
    if mixer.has_linear_branch:
        down, up, bias = gate_matrices(model)
        new += model.kv_channels + down + (up + bias) // parallel.tensor_model_parallel_size
    return new


def gate_matrices(model: ModelConfig) -> tuple[int, int, int]:
    """Elements of the forget gate's W1 (r h), W2 (G d r) and b2 (G d); a tied gate has none."""
    gate, rank = model.num_query_groups * model.kv_channels, model.gla.gate_low_rank_dim
    sizes = {GateKind.low_rank: (rank * model.hidden_size, gate * rank, gate), GateKind.tied: (0, 0, 0)}
    return of_kind(model.gla.gate, sizes, "the parameters of a gate")


def mixer_parameters(model: ModelConfig, mixer: Mixer, parallel: ParallelConfig = ONE_RANK) -> int:
    """Parameters of one layer's mixer on one rank; q/k norms are on every rank."""
    split = qkv_matrix(model) + output_matrix(model)
    if model.add_qkv_bias:
        split += (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
    whole = 2 * model.kv_channels if model.qk_layernorm else 0
    branch = split // parallel.tensor_model_parallel_size + whole
    return len(mixer.branches) * branch + new_mixer_parameters(model, mixer, parallel)


def swiglu(model: ModelConfig, width: int) -> int:
    """Elements of the three matrices of a feed-forward or expert: 3 f h."""
    return 3 * width * model.hidden_size


def router_parameters(model: ModelConfig) -> int:
    """Elements of the router of one mixture-of-experts layer, on every rank: E h."""
    return model.moe.num_experts * model.hidden_size


def routed_expert_parameters(model: ModelConfig, parallel: ParallelConfig = ONE_RANK) -> int:
    """Parameters of the routed experts of one layer on one rank."""
    local_experts = model.moe.num_experts // parallel.expert_model_parallel_size
    return local_experts * swiglu(model, model.expert_ffn_hidden_size) // parallel.expert_tensor_size


def feed_forward_parameters(
    model: ModelConfig, feed_forward: FeedForward, parallel: ParallelConfig = ONE_RANK
) -> int:
    """Parameters of one layer's feed-forward on one rank: SwiGLU, or router, routed and shared experts."""
    tensor = parallel.tensor_model_parallel_size
    shared = model.moe.num_shared_experts * swiglu(model, model.expert_ffn_hidden_size)
    routed = routed_expert_parameters(model, parallel)
    parameters = {
        FeedForward.dense: swiglu(model, model.ffn_hidden_size) // tensor,
        FeedForward.moe: router_parameters(model) + routed + shared // tensor,
    }
    return of_kind(feed_forward, parameters, "the parameters of a feed-forward")


def layer_parameters(model: ModelConfig, layer: int, parallel: ParallelConfig = ONE_RANK) -> int:
    """Parameters of decoder layer ``layer`` (0-based) on one rank: mixer, feed-forward, two norms (2 h)."""
    mixer, feed_forward = model.layer_mixers()[layer], model.layer_feed_forwards()[layer]
    return (
        mixer_parameters(model, mixer, parallel)
        + feed_forward_parameters(model, feed_forward, parallel)
        + 2 * model.hidden_size
    )


def total_parameters(model: ModelConfig) -> int:
    """Distinct parameters without vocabulary padding, as a Hugging Face checkpoint counts them."""
    vocabulary = model.vocab_size * model.hidden_size
    embeddings = vocabulary if model.share_embeddings_and_output_weights else 2 * vocabulary
    layers = sum(layer_parameters(model, layer) for layer in range(model.num_layers))
    return embeddings + model.num_sink_tokens * model.hidden_size + layers + model.hidden_size


def active_parameters(model: ModelConfig) -> int:
    """Parameters behind one token: all but the routed experts that it does not visit. Both vocabulary
    matrices count.
    """
    idle = (model.moe.num_experts - model.moe.router_topk) * swiglu(model, model.expert_ffn_hidden_size)
    return total_parameters(model) - model.layer_feed_forwards().count(FeedForward.moe) * idle


def new_parameters(model: ModelConfig) -> int:
    """Parameters that a dense source does not have: sinks, routers, and what is new in the mixers."""
    mixers = sum(new_mixer_parameters(model, mixer) for mixer in model.layer_mixers())
    routers = model.layer_feed_forwards().count(FeedForward.moe) * router_parameters(model)
    return mixers + routers + model.num_sink_tokens * model.hidden_size


def stage_layers(model: ModelConfig, parallel: ParallelConfig, stage: int) -> range:
    """The decoder layers (0-based) of pipeline stage ``stage``."""
    layers = model.num_layers // parallel.pipeline_model_parallel_size
    return range(stage * layers, (stage + 1) * layers)


def stage_routed_expert_parameters(model: ModelConfig, parallel: ParallelConfig, stage: int) -> int:
    """Parameters of routed experts that a rank of pipeline stage ``stage`` holds."""
    feed_forwards = model.layer_feed_forwards()
    layers = [feed_forwards[layer] for layer in stage_layers(model, parallel, stage)]
    return layers.count(FeedForward.moe) * routed_expert_parameters(model, parallel)


def stage_parameters(model: ModelConfig, parallel: ParallelConfig, stage: int) -> int:
    """Parameters that a rank of pipeline stage ``stage`` holds, vocabulary padding included.

    The embedding and the sinks are on the first stage; the output projection and the final norm are on the
    last. A tied output projection is the embedding where both are on one stage, and a copy of it where they
    are not.
    """
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layers = stage_layers(model, parallel, stage)
    parameters = sum(layer_parameters(model, layer, parallel) for layer in layers)
    vocabulary = model.padded_vocab_size(tensor) // tensor * model.hidden_size
    if stage == 0:
        parameters += vocabulary + model.num_sink_tokens * model.hidden_size
    if stage == stages - 1:
        parameters += model.hidden_size
        if stages > 1 or not model.share_embeddings_and_output_weights:
            parameters += vocabulary
    return parameters


def visible_keys(seq_length: int, window: int | None = None) -> float:
    """Keys that a causal query sees, on average over a sequence; the query itself counts.

    Full attention: (T + 1) / 2. A window w < T: the first w queries see 1 .. w keys, the others w.
    """
    if window is None or window >= seq_length:
        return (seq_length + 1) / 2
    return (window * (window + 1) / 2 + (seq_length - window) * window) / seq_length


def mixer_core_flops(model: ModelConfig, mixer: Mixer, seq_length: int) -> float:
    """Forward FLOPs of a mixer between its projections, per token of text; sinks' own work is shared out.

    Softmax: scores and weighted values, 2 H d FLOPs each per visible key; sinks are keys of every token. GLA:
    reading the state (q S, 2 H d d) and writing it (k^T v, 2 G d d, since the heads of a group share one
    state), the same for any T. Softmax, gates and norms are left out, as is what a chunked or blocked kernel
    does beyond this.
    """
    heads, groups, width = model.num_attention_heads, model.num_query_groups, model.kv_channels
    sinks = model.num_sink_tokens

    def softmax(branch: Mixer) -> float:
        keys = visible_keys(seq_length, model.window_of(branch)) + sinks + sinks * sinks / seq_length
        return 4.0 * heads * width * keys

    flops = {
        Mixer.gla: 2.0 * (heads + groups) * width * width * (1 + sinks / seq_length),
        Mixer.swa: softmax(Mixer.swa),
        Mixer.full: softmax(Mixer.full),
    }
    return sum(of_kind(branch, flops, "the FLOPs of an attention") for branch in mixer.branches)


def mixer_projections(model: ModelConfig, mixer: Mixer) -> tuple[int, int]:
    """Matrix elements of a mixer's projections, as (those that read the layer's input, the others)."""
    copies = len(mixer.branches)
    reading, other = copies * qkv_matrix(model), copies * output_matrix(model)
    if mixer.has_linear_branch:
        down, up, _ = gate_matrices(model)
        reading, other = reading + down, other + up
    return reading, other


def feed_forward_matrices(model: ModelConfig, feed_forward: FeedForward) -> int:
    """Matrix elements of a feed-forward that one token meets: router, its experts, and the shared ones."""
    experts = model.moe.router_topk + model.moe.num_shared_experts
    met = {
        FeedForward.dense: swiglu(model, model.ffn_hidden_size),
        FeedForward.moe: router_parameters(model) + experts * swiglu(model, model.expert_ffn_hidden_size),
    }
    return of_kind(feed_forward, met, "the matrices of a feed-forward")


def forward_flops_per_token(model: ModelConfig, seq_length: int, *, output_layer: bool = True) -> float:
    """Model FLOPs of the forward pass per token of text: two per matrix element that it meets, plus the
    mixers' cores. What the sinks in front cost is shared out over the text.

    The embedding lookup is free, and neither vocabulary padding nor padding to an expert's capacity counts.
    ``output_layer=False`` stops at the final norm.
    """
    tokens = 1 + model.num_sink_tokens / seq_length
    flops = 0.0
    for mixer, feed_forward in zip(model.layer_mixers(), model.layer_feed_forwards(), strict=True):
        matrices = sum(mixer_projections(model, mixer)) + feed_forward_matrices(model, feed_forward)
        flops += 2.0 * matrices * tokens + mixer_core_flops(model, mixer, seq_length)
    return flops + (2.0 * model.vocab_size * model.hidden_size if output_layer else 0.0)


def training_flops_per_token(config: RunConfig, teacher: ModelConfig | None = None) -> float:
    """Model FLOPs of one token of training, the numerator of MFU. Recomputation does not count.

    cpt: forward and backward, 3 x forward (about 6 N plus attention), and with distillation the teacher's
    forward. align: the teacher's forward up to the last hidden states, and forward and backward of each
    swapped mixer, whose projections from the layer's (frozen) input need no gradient with respect to it.

    Args:
        config: the run.
        teacher: architecture of the teacher; None takes the dense twin of the model.
    """
    price = of_kind(config.stage.kind, _TRAINING_FLOPS, "the FLOPs of a stage")
    return price(config, teacher or dense_twin(config.model))


def _pretraining_flops(config: RunConfig, teacher: ModelConfig) -> float:
    stage = config.stage
    flops = 3 * forward_flops_per_token(config.model, stage.seq_length)
    if stage.distillation.weight > 0:
        flops += forward_flops_per_token(teacher, stage.seq_length)
    return flops


def _alignment_flops(config: RunConfig, teacher: ModelConfig) -> float:
    model, stage = config.model, config.stage
    flops = forward_flops_per_token(teacher, stage.seq_length, output_layer=False)
    mixers, tokens = model.layer_mixers(), 1 + model.num_sink_tokens / stage.seq_length
    for layer in swapped_layers(model):
        reading, other = mixer_projections(model, mixers[layer])
        flops += tokens * (4.0 * reading + 6.0 * other)
        flops += 3 * mixer_core_flops(model, mixers[layer], stage.seq_length)
    return flops


_TRAINING_FLOPS: dict[StageKind, Callable[[RunConfig, ModelConfig], float]] = {
    StageKind.cpt: _pretraining_flops,
    StageKind.align: _alignment_flops,
}
