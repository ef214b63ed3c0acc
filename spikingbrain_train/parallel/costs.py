"""What a model costs in parameters and arithmetic, from its config alone. Pure Python: no torch.

Letters: h hidden_size, f ffn_hidden_size, H query heads, G query groups, d kv_channels, r gate_low_rank_dim,
V vocabulary, T sequence length, t tensor-parallel degree.
"""

from __future__ import annotations

import dataclasses

from spikingbrain_train.config.model import Mixer, ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig, StageKind


def dense_twin(model: ModelConfig) -> ModelConfig:
    """The same network with full attention in every layer: the dense source that teaches it."""
    return dataclasses.replace(model, mixers=[Mixer.full])


def swapped_layers(model: ModelConfig) -> list[int]:
    """Layers (0-based) whose mixer is not the dense source's; the alignment stage trains their mixers."""
    return [layer for layer, mixer in enumerate(model.layer_mixers()) if mixer is not Mixer.full]


def qkv_matrix(model: ModelConfig) -> int:
    """Elements of the fused q, k and v projection: (H + 2G) d h."""
    return (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels * model.hidden_size


def output_matrix(model: ModelConfig) -> int:
    """Elements of a mixer's output projection: H d h."""
    return model.num_attention_heads * model.kv_channels * model.hidden_size


def new_mixer_parameters(model: ModelConfig, tensor: int = 1) -> int:
    """Parameters of one GLA mixer that its dense source does not have, on one of ``tensor`` ranks.

    The gate's down projection (r h) and the output norm (d) are on every rank; its up projection (G d r) and
    bias (G d) are split.
    """
    gate = model.num_query_groups * model.kv_channels
    rank = model.gla.gate_low_rank_dim
    return rank * model.hidden_size + model.kv_channels + gate * (rank + 1) // tensor


def mixer_parameters(model: ModelConfig, mixer: Mixer, tensor: int = 1) -> int:
    """Parameters of one layer's mixer on one of ``tensor`` ranks; q/k norms are on every rank."""
    split = qkv_matrix(model) + output_matrix(model)
    if model.add_qkv_bias:
        split += (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
    whole = 2 * model.kv_channels if model.qk_layernorm else 0
    new = new_mixer_parameters(model, tensor) if mixer is Mixer.gla else 0
    return split // tensor + whole + new


def layer_parameters(model: ModelConfig, mixer: Mixer, tensor: int = 1) -> int:
    """Parameters of a decoder layer on one of ``tensor`` ranks: mixer, SwiGLU (3 f h), two norms (2 h)."""
    feed_forward = 3 * model.ffn_hidden_size * model.hidden_size // tensor
    return mixer_parameters(model, mixer, tensor) + feed_forward + 2 * model.hidden_size


def total_parameters(model: ModelConfig) -> int:
    """Distinct parameters without vocabulary padding, as a Hugging Face checkpoint counts them."""
    vocabulary = model.vocab_size * model.hidden_size
    embeddings = vocabulary if model.share_embeddings_and_output_weights else 2 * vocabulary
    layers = sum(layer_parameters(model, mixer) for mixer in model.layer_mixers())
    return embeddings + layers + model.hidden_size


def stage_layers(model: ModelConfig, parallel: ParallelConfig, stage: int) -> range:
    """The decoder layers (0-based) of pipeline stage ``stage``."""
    layers = model.num_layers // parallel.pipeline_model_parallel_size
    return range(stage * layers, (stage + 1) * layers)


def stage_parameters(model: ModelConfig, parallel: ParallelConfig, stage: int) -> int:
    """Parameters that a rank of pipeline stage ``stage`` holds, vocabulary padding included.

    The embedding is on the first stage; the output projection and the final norm are on the last. A tied
    output projection is the embedding where both are on one stage, and a copy of it where they are not.
    """
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    mixers = model.layer_mixers()
    parameters = sum(
        layer_parameters(model, mixers[layer], tensor) for layer in stage_layers(model, parallel, stage)
    )
    vocabulary = model.padded_vocab_size(tensor) // tensor * model.hidden_size
    if stage == 0:
        parameters += vocabulary
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
    """Forward FLOPs per token of a mixer between its projections.

    Softmax: scores and weighted values, 2 H d FLOPs each per visible key. GLA: reading the state (q S,
    2 H d d) and writing it (k^T v, 2 G d d, since the heads of a group share one state), the same for any T.
    Softmax, gates and norms are left out, as is what a chunked or blocked kernel does beyond this.
    """
    heads, groups, width = model.num_attention_heads, model.num_query_groups, model.kv_channels
    if mixer is Mixer.gla:
        return 2.0 * (heads + groups) * width * width
    window = model.sliding_window if mixer is Mixer.swa else None
    return 4.0 * heads * width * visible_keys(seq_length, window)


def mixer_projections(model: ModelConfig, mixer: Mixer) -> tuple[int, int]:
    """Matrix elements of a mixer's projections, as (those that read the layer's input, the others)."""
    reading, other = qkv_matrix(model), output_matrix(model)
    if mixer is Mixer.gla:
        rank = model.gla.gate_low_rank_dim
        reading += rank * model.hidden_size
        other += model.num_query_groups * model.kv_channels * rank
    return reading, other


def forward_flops_per_token(model: ModelConfig, seq_length: int, *, output_layer: bool = True) -> float:
    """Model FLOPs of one token's forward pass: two per matrix element that it meets, plus the mixers' cores.

    The embedding lookup is free and vocabulary padding does not count. ``output_layer=False`` stops at the
    final norm.
    """
    flops = 0.0
    for mixer in model.layer_mixers():
        matrices = sum(mixer_projections(model, mixer)) + 3 * model.hidden_size * model.ffn_hidden_size
        flops += 2.0 * matrices + mixer_core_flops(model, mixer, seq_length)
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
    model, stage = config.model, config.stage
    teacher = teacher or dense_twin(model)
    if stage.kind is StageKind.cpt:
        flops = 3 * forward_flops_per_token(model, stage.seq_length)
        if stage.distillation.weight > 0:
            flops += forward_flops_per_token(teacher, stage.seq_length)
        return flops
    flops = forward_flops_per_token(teacher, stage.seq_length, output_layer=False)
    mixers = model.layer_mixers()
    for layer in swapped_layers(model):
        reading, other = mixer_projections(model, mixers[layer])
        flops += 4.0 * reading + 6.0 * other + 3 * mixer_core_flops(model, mixers[layer], stage.seq_length)
    return flops
