"""Which modules the specs of a pipeline stage name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import (
    ContextParallelConfig,
    KernelConfig,
    LinearAttentionBackend,
    LinearAttentionContextParallel,
    ParallelLinearBackend,
    SlidingWindowContextParallel,
    SoftmaxAttentionBackend,
)
from spikingbrain_train.models.layer_specs import ParallelLinears, block_spec, layer_build, layer_spec
from spikingbrain_train.models.mixers.gated_linear_attention import GatedLinearAttention
from spikingbrain_train.models.mixers.parallel_hybrid import ParallelHybrid
from spikingbrain_train.models.mixers.softmax_attention import SoftmaxAttention
from spikingbrain_train.models.rms_norm import RMSNorm

MODEL = ModelConfig(
    num_layers=6,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=64,
    max_position_embeddings=64,
    mixers=["gla", "swa", "full"],
    sliding_window=5,
)
KERNELS = KernelConfig(
    gated_linear_attention=LinearAttentionBackend.naive,
    softmax_attention=SoftmaxAttentionBackend.naive,
    parallel_linear=ParallelLinearBackend.megatron,
)


CONTEXT_PARALLEL = ContextParallelConfig(
    gated_linear_attention=LinearAttentionContextParallel.allscan,
    sliding_window_attention=SlidingWindowContextParallel.ulysses,
)


def mixer_spec(mixer: Any, model: ModelConfig = MODEL) -> ModuleSpec:
    (layer,) = layers(replace(model, num_layers=1, mixers=[mixer]))
    return layer_spec(layer, layer_build(model, KERNELS, CONTEXT_PARALLEL)).submodules.self_attention


def branches(spec: ModuleSpec) -> list[ModuleSpec]:
    return list(spec.submodules.branches.values()) if spec.module is ParallelHybrid else [spec]


@pytest.mark.parametrize(
    ("mixer", "window"), [("swa", 5), (["gla", "swa"], 5), ("full", None), (["gla", "full"], None)]
)
def test_softmax_mixers_differ_in_their_window(mixer: Any, window: int | None) -> None:
    spec = branches(mixer_spec(mixer))[0]
    assert spec.module is SoftmaxAttention
    assert spec.params["window"] == window
    assert spec.params["backend"] is SoftmaxAttentionBackend.naive
    assert spec.params["context_parallel"] is SlidingWindowContextParallel.ulysses


@pytest.mark.parametrize("mixer", ["gla", ["gla", "swa"], ["gla", "full"]])
def test_linear_attention_gets_its_settings_and_backend(mixer: Any) -> None:
    spec = branches(mixer_spec(mixer))[-1]
    assert spec.module is GatedLinearAttention
    assert spec.params["gla"] == MODEL.gla
    assert spec.params["backend"] is LinearAttentionBackend.naive
    assert spec.params["context_parallel"] is LinearAttentionContextParallel.allscan


def test_a_stage_gets_its_own_part_of_the_pattern() -> None:
    specs = block_spec(layer_build(MODEL, KERNELS), first_layer=2, num_layers=2).layer_specs
    modules = [spec.submodules.self_attention.module for spec in specs]
    assert modules == [SoftmaxAttention, GatedLinearAttention]  # layers 2 (full) and 3 (gla)


@pytest.mark.parametrize("mixer", ["full", "swa", "gla", ["gla", "swa"], ["gla", "full"]])
@pytest.mark.parametrize(("qk_layernorm", "expected"), [(True, RMSNorm), (False, IdentityOp)])
def test_query_and_key_norms_follow_the_config(mixer: Any, qk_layernorm: bool, expected: type) -> None:
    model = replace(MODEL, qk_layernorm=qk_layernorm)
    for spec in branches(mixer_spec(mixer, model)):
        assert (spec.submodules.q_layernorm, spec.submodules.k_layernorm) == (expected, expected)


@pytest.mark.parametrize("projection", Projection, ids=lambda projection: projection.value)
def test_projections_are_megatrons_parallel_linears(projection: Projection) -> None:
    linears = ParallelLinears(ParallelLinearBackend.megatron)
    assert (linears.column(projection), linears.row(projection)) == (ColumnParallelLinear, RowParallelLinear)


def test_an_unresolved_backend_is_a_defect() -> None:
    with pytest.raises(AssertionError, match="unresolved"):
        ParallelLinears(ParallelLinearBackend.auto)
