"""Which feed-forward stands in which layer, and what megatron-core is told about it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer

from spikingbrain_train.architecture.feed_forwards import FEED_FORWARDS
from spikingbrain_train.config.linear_transforms import Projection, SpikingConfig
from spikingbrain_train.config.model import ActivationFunc, ModelConfig, MoEConfig
from spikingbrain_train.config.parallel import (
    ExpertBackend,
    KernelConfig,
    LinearAttentionBackend,
    ParallelConfig,
    ParallelLinearBackend,
    Recompute,
    SoftmaxAttentionBackend,
)
from spikingbrain_train.config.run import Precision
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.models.feed_forwards.gated_activation import (
    GatedActivation,
    gated_submodules,
    with_activation,
)
from spikingbrain_train.models.feed_forwards.moe import spec as moe
from spikingbrain_train.models.layer_specs import block_spec, layer_build
from spikingbrain_train.models.transformer_config import transformer_config

KERNELS = KernelConfig(
    gated_linear_attention=LinearAttentionBackend.chunk,
    softmax_attention=SoftmaxAttentionBackend.blocked,
    parallel_linear=ParallelLinearBackend.megatron,
    experts=ExpertBackend.sequential,
)
MODEL = ModelConfig(
    num_layers=6,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=64,
    max_position_embeddings=64,
    mixers=["full"],
    feed_forwards=["dense", "dense", "moe"],
    moe=MoEConfig(num_experts=4, num_shared_experts=2, moe_ffn_hidden_size=24),
)


def _module(spec: Any) -> Any:
    """The class behind a ModuleSpec (megatron-core 0.16) or a builder (0.19)."""
    module = spec.module if hasattr(spec, "module") else spec.func
    return getattr(module, "__self__", module)


def test_experts_are_in_the_layers_that_the_config_names() -> None:
    specs = block_spec(layer_build(MODEL, KERNELS), first_layer=1, num_layers=4).layer_specs
    assert [_module(spec.submodules.mlp) for spec in specs] == [MLP, MoELayer, MLP, MLP]


def test_megatron_core_is_told_the_sizes_of_experts() -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
    )
    config = transformer_config(MODEL, parallel, Precision.fp32, on_cpu=True)
    assert config.moe_layer_freq == [0, 0, 1, 0, 0, 1]
    assert (config.num_moe_experts, config.moe_ffn_hidden_size) == (4, 24)
    assert config.moe_shared_expert_intermediate_size == 48
    assert (config.expert_model_parallel_size, config.expert_tensor_parallel_size) == (4, 1)


def test_a_dense_teacher_stands_beside_a_student_whose_experts_are_spread() -> None:
    dense = replace(MODEL, feed_forwards=["dense"])
    config = transformer_config(
        dense, ParallelConfig(expert_model_parallel_size=2), Precision.fp32, on_cpu=True
    )
    assert config.num_moe_experts is None and config.expert_model_parallel_size == 1


@pytest.mark.parametrize("level", Recompute, ids=lambda level: level.value)
def test_every_level_of_recomputation_is_accepted_by_megatron_core(level: Recompute) -> None:
    config = transformer_config(MODEL, ParallelConfig(recompute=level), Precision.fp32, on_cpu=True)
    assert config.recompute is level
    assert (config.recompute_granularity == "full") == (level is Recompute.full)


def test_spikes_inside_experts_without_linear_layers_are_refused() -> None:
    spiking = SpikingConfig(projections=[Projection.mlp_fc1])
    kernels = replace(KERNELS, experts=ExpertBackend.grouped_gemm)
    with pytest.raises(ConfigurationError, match="experts=grouped_gemm cannot encode spikes .* choose seq"):
        moe.spec(FEED_FORWARDS["moe"], layer_build(replace(MODEL, spiking=spiking), kernels))


def test_copies_of_experts_that_share_a_product_are_refused() -> None:
    kernels = replace(KERNELS, experts=ExpertBackend.transformer_engine)
    with pytest.raises(ConfigurationError, match=r"replicate_expert_load .* choose sequential"):
        moe.spec(FEED_FORWARDS["moe"], layer_build(MODEL, kernels, replicates_experts=True))


def test_grouped_gemm_computes_swiglus_only() -> None:
    build = layer_build(
        replace(MODEL, activation_func=ActivationFunc.relu),
        replace(KERNELS, experts=ExpertBackend.grouped_gemm),
    )
    with pytest.raises(
        ConfigurationError, match=r"experts=grouped_gemm cannot compute model\.activation_func=relu; choose"
    ):
        moe.spec(FEED_FORWARDS["moe"], build)


def test_an_activation_is_a_matter_of_the_modules_that_have_it() -> None:
    """Feed-forwards of other kinds read ``activation_func`` of the model's config, and bring their own."""
    relu = replace(MODEL, activation_func=ActivationFunc.relu)
    config = transformer_config(relu, ParallelConfig(), Precision.fp32, on_cpu=True)
    own = with_activation(config)
    assert own.use_te_activation_func and not config.use_te_activation_func
    swiglu = transformer_config(MODEL, ParallelConfig(), Precision.fp32, on_cpu=True)
    assert with_activation(swiglu) is swiglu
    parts = {
        model.activation_func: gated_submodules(layer_build(model, KERNELS), 32) for model in (MODEL, relu)
    }
    assert parts[ActivationFunc.silu].activation_func is None
    assert issubclass(parts[ActivationFunc.relu].activation_func, GatedActivation)
