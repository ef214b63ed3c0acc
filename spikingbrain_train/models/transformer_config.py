"""megatron-core's TransformerConfig from our model, parallel and precision settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from spikingbrain_train.config.kinds import of_kind
from spikingbrain_train.config.model import FeedForward, ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.config.run import Precision
from spikingbrain_train.runtime.bf16 import PARAMS_DTYPE


@dataclass
class HybridTransformerConfig(TransformerConfig):
    """TransformerConfig with what megatron-core has no field for."""

    recompute: Recompute = Recompute.none
    """Activation recomputation; those levels that our modules carry out themselves read it."""


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    *,
    on_cpu: bool,
    initialize: bool = True,
) -> HybridTransformerConfig:
    """Describe the decoder to megatron-core.

    Args:
        model: architecture.
        parallel: parallel degrees and recomputation.
        precision: number format of weights and activations.
        on_cpu: weights are created on the CPU, with values that do not depend on tensor_model_parallel_size.
        initialize: fill the weights; False when a checkpoint is about to be loaded.
    """
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
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision is Precision.bf16,
        # These fusions live in Apex or Transformer Engine.
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        recompute=parallel.recompute,
        **of_kind(parallel.recompute, _RECOMPUTE, "megatron-core's settings of recomputation"),
        **_mixture_of_experts(model, parallel),
    )


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
(models/moe)."""


def _mixture_of_experts(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Nothing for a model without experts, also where another one of the run has them (a dense teacher)."""
    kinds, moe = model.layer_feed_forwards(), model.moe
    if FeedForward.moe not in kinds:
        return {}
    width = model.expert_ffn_hidden_size
    return {
        "num_moe_experts": moe.num_experts,
        "moe_layer_freq": [int(kind is FeedForward.moe) for kind in kinds],
        "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": moe.num_shared_experts * width or None,
        "moe_router_topk": moe.router_topk,
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": moe.aux_loss_coeff,
        "moe_z_loss_coeff": moe.z_loss_coeff,
        "moe_expert_capacity_factor": moe.capacity_factor,
        "moe_pad_expert_input_to_capacity": moe.pad_to_capacity,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
    }
