"""megatron-core's TransformerConfig from our model, parallel and precision settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.config.enum_tables import entry_of
from spikingbrain_train.config.fp8 import Fp8Config
from spikingbrain_train.config.model import ActivationFunc, ModelConfig, RouterWeights
from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.config.run import Precision
from spikingbrain_train.runtime.bf16 import PARAMS_DTYPE


@dataclass
class HybridTransformerConfig(TransformerConfig):
    """TransformerConfig with what megatron-core has no field for."""

    recompute: Recompute = Recompute.none
    """Activation recomputation; those levels that our modules carry out themselves read it."""
    most_expert_tokens: int | None = None
    """Tokens of an expert above which all of it is computed again; None: no number is too many."""
    replicate_expert_load: float | None = None
    """Multiple of the mean load above which an expert is computed on all expert-parallel ranks."""
    norm_topk_prob: bool = False
    """Whether routers make the probabilities of a token's experts add up to 1."""
    router_weights: RouterWeights = RouterWeights.softmax
    """What the outputs of a token's experts are weighted by."""
    router_hidden_size: int | None = None
    """Width of the hidden layer of routers; None where they are linear."""
    router_bias: bool = False
    """Whether the logits of experts have biases."""
    router_bias_decay_iters: int = 0
    """Steps over which these go to zero."""
    gated_activation: ActivationFunc = ActivationFunc.silu
    """Of dense feed-forwards and experts, which read this; ``activation_func`` is that of a SwiGLU."""
    fatrelu_threshold: float = 0.0
    """Of ``gated_activation=fatrelu``."""
    fp8_linears: Fp8Config | None = None
    """What linears multiply while they train; megatron-core's own ``fp8``, which says it of whole layers,
    stays off."""


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    *,
    on_cpu: bool,
    initialize: bool = True,
    fp8: Fp8Config | None = None,
) -> HybridTransformerConfig:
    """Describe the decoder to megatron-core.

    Args:
        model: architecture.
        parallel: parallel degrees and recomputation.
        precision: number format of weights and activations.
        on_cpu: weights are created on the CPU, with values that do not depend on tensor_model_parallel_size.
        initialize: fill the weights; False when a checkpoint is about to be loaded.
        fp8: what linears multiply while they train; None multiplies in that format.
    """
    is_fp8 = fp8 is not None and fp8.format is not None
    dtype = PARAMS_DTYPE[precision]
    return HybridTransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=not on_cpu,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_method_std,
        perform_initialization=initialize,
        use_cpu_initialization=on_cpu,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        pipeline_model_parallel_layout=_pipeline_layout(parallel),
        # Of two pipeline ranks each is the other's next and last one: with virtual stages it sends
        # activations and gradients to it at once, which one batch of sends could not tell apart.
        overlap_p2p_comm=parallel.virtual_stages > 1,
        batch_p2p_comm=parallel.virtual_stages == 1,
        # What was sent to the next stage has had its use; its graph is kept. With virtual stages a send may
        # still read it.
        deallocate_pipeline_outputs=parallel.pipeline_model_parallel_size > 1
        and parallel.virtual_stages == 1,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision is Precision.bf16,
        # Switched on linear by linear (models/weight_gradients.py), not in all that megatron-core builds.
        gradient_accumulation_fusion=False,
        # Of megatron-core's own attention, which no mixer calls.
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        recompute=parallel.recompute,
        replicate_expert_load=parallel.replicate_expert_load,
        most_expert_tokens=parallel.most_expert_tokens,
        gated_activation=model.activation_func,
        fatrelu_threshold=model.fatrelu_threshold,
        fp8_linears=fp8 if is_fp8 else None,
        # Else Transformer Engine would multiply by the FP8 weights of the first micro-batch ever: it learns
        # from megatron-core's ``fp8`` alone that a new step has begun.
        disable_parameter_transpose_cache=is_fp8,
        **entry_of(parallel.recompute, _RECOMPUTE, "megatron-core's settings of recomputation"),
        **_feed_forwards(model, parallel),
    )


def _pipeline_layout(parallel: ParallelConfig) -> list[list[str]] | None:
    """What each (virtual) pipeline stage holds, in megatron-core's words; None leaves even stages to it."""
    if parallel.pipeline_model_parallel_layout is None:
        return None
    stages = [["decoder"] * number for number in parallel.pipeline_model_parallel_layout]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


_RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    Recompute.none: {},
    Recompute.moe_activation: {},
    Recompute.full: {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    Recompute.moe_layer: {"recompute_granularity": "selective", "recompute_modules": ["moe", "mlp"]},
    Recompute.moe_feed_forward: {
        "recompute_granularity": "selective",
        "recompute_modules": ["shared_experts", "mlp"],
    },
}
"""What megatron-core itself computes again ("mlp": dense feed-forwards); our router and experts do the rest
(models/feed_forwards/moe)."""


def _feed_forwards(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """What the kinds of feed-forwards need; nothing for experts that only another model of the run has."""
    kinds = [layer.feed_forward for layer in layers(model)]
    settings: dict[str, Any] = {}
    for kind in dict.fromkeys(kinds):
        settings |= kind.megatron_settings(model, parallel, [other is kind for other in kinds])
    return settings
