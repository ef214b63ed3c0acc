"""megatron-core's TransformerConfig from our model, parallel and precision settings."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.config.run import Precision

PARAMS_DTYPE = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}
"""The dtype of weights and activations for each precision."""


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    *,
    on_cpu: bool,
    initialize: bool = True,
) -> TransformerConfig:
    """Describe the decoder to megatron-core.

    Args:
        model: architecture.
        parallel: parallel degrees and recomputation.
        precision: number format of weights and activations.
        on_cpu: weights are created on the CPU, with values that do not depend on tensor_model_parallel_size.
        initialize: fill the weights; False when a checkpoint is about to be loaded.
    """
    dtype = PARAMS_DTYPE[precision]
    recompute = {}
    if parallel.recompute is Recompute.full:
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return TransformerConfig(
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
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision is Precision.bf16,
        # These fusions live in Apex or Transformer Engine.
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **recompute,
    )
