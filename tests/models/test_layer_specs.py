"""Which modules the specs of a pipeline stage name."""

from __future__ import annotations

from dataclasses import replace

import pytest
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp

from spikingbrain_train.config.model import Mixer, ModelConfig
from spikingbrain_train.config.parallel import (
    KernelConfig,
    LinearAttentionBackend,
    ParallelLinearBackend,
    SoftmaxAttentionBackend,
)
from spikingbrain_train.models.layer_specs import SELF_ATTENTION, ParallelLinears, block_spec, layer_spec
from spikingbrain_train.models.mixers.gated_linear_attention import GatedLinearAttention
from spikingbrain_train.models.mixers.softmax_attention import SoftmaxCoreAttention
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
    mixers=[Mixer.gla, Mixer.swa, Mixer.full],
    sliding_window=5,
)
KERNELS = KernelConfig(
    gated_linear_attention=LinearAttentionBackend.recurrent,
    softmax_attention=SoftmaxAttentionBackend.reference,
    parallel_linear=ParallelLinearBackend.megatron,
)


def window(mixer: Mixer) -> int | None:
    core = layer_spec(mixer, MODEL, KERNELS).submodules.self_attention.submodules.core_attention
    assert core.func is SoftmaxCoreAttention
    assert core.keywords["backend"] is SoftmaxAttentionBackend.reference
    return core.keywords["window"]


def test_every_mixer_of_the_config_has_a_spec() -> None:
    assert SELF_ATTENTION.keys() == set(Mixer)


def test_softmax_mixers_differ_in_their_window() -> None:
    assert window(Mixer.swa) == 5
    assert window(Mixer.full) is None


def test_linear_attention_gets_its_settings_and_backend() -> None:
    spec = layer_spec(Mixer.gla, MODEL, KERNELS).submodules.self_attention
    assert spec.module is GatedLinearAttention
    assert spec.params == {"gla": MODEL.gla, "backend": LinearAttentionBackend.recurrent}


def test_a_stage_gets_its_own_part_of_the_pattern() -> None:
    specs = block_spec(MODEL, KERNELS, first_layer=2, num_layers=2).layer_specs
    modules = [spec.submodules.self_attention.module for spec in specs]
    assert modules == [SelfAttention, GatedLinearAttention]  # layers 2 (full) and 3 (gla)


@pytest.mark.parametrize("mixer", list(Mixer))
@pytest.mark.parametrize(("qk_layernorm", "expected"), [(True, RMSNorm), (False, IdentityOp)])
def test_query_and_key_norms_follow_the_config(mixer: Mixer, qk_layernorm: bool, expected: type) -> None:
    model = replace(MODEL, qk_layernorm=qk_layernorm)
    submodules = layer_spec(mixer, model, KERNELS).submodules.self_attention.submodules
    assert (submodules.q_layernorm, submodules.k_layernorm) == (expected, expected)


def test_projections_are_megatrons_parallel_linears() -> None:
    linears = ParallelLinears.of(ParallelLinearBackend.megatron)
    assert (linears.column, linears.row) == (ColumnParallelLinear, RowParallelLinear)


def test_an_unresolved_backend_is_a_defect() -> None:
    with pytest.raises(AssertionError, match="unresolved"):
        ParallelLinears.of(ParallelLinearBackend.auto)
