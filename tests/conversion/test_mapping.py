"""The mapping table: row permutations, shapes and completeness."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.mamba import MambaConfig
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.dense import LLAMA
from spikingbrain_train.conversion.formats.gla_swa import GLA_SWA
from spikingbrain_train.conversion.mapping import Parameter, model_parameters
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.models.fused_tensors import Transform


def small_model(**changes: object) -> ModelConfig:
    sizes = {
        "num_layers": 4,
        "hidden_size": 24,
        "ffn_hidden_size": 40,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "kv_channels": 4,
        "vocab_size": 11,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def parameter(model: ModelConfig, name: str) -> Parameter:
    return next(candidate for candidate in model_parameters(model) if candidate.name == name)


def test_fused_qkv_rows_lie_group_by_group() -> None:
    """Against the layout written out as a loop: for each group its q heads, then its k, then its v."""
    model = small_model(mixers=["full"])
    rows = [
        torch.arange(24) + 1000,
        torch.arange(8) + 2000,
        torch.arange(8) + 3000,
    ]
    qkv = parameter(
        small_model(mixers=["full"], add_qkv_bias=True), "decoder.layers.0.self_attention.linear_qkv.bias"
    )
    expected = []
    for group in range(model.num_query_groups):
        for head in range(3 * group, 3 * group + 3):
            expected += rows[0][4 * head : 4 * head + 4].tolist()
        expected += rows[1][4 * group : 4 * group + 4].tolist()
        expected += rows[2][4 * group : 4 * group + 4].tolist()
    assert qkv.fuse(rows).tolist() == expected


def test_gate_comes_before_up_in_fc1() -> None:
    fc1 = parameter(small_model(), "decoder.layers.0.mlp.linear_fc1.weight")
    gate, up = torch.zeros(40, 24), torch.ones(40, 24)
    assert next(iter(fc1.tensors(LLAMA))).endswith("gate_proj.weight")
    assert fc1.fuse([gate, up])[:40].sum() == 0
    assert fc1.fuse([gate, up])[40:].min() == 1


def test_both_halves_of_a_scans_input_lie_channel_by_channel() -> None:
    model = small_model(mixers=["mamba"], mamba=MambaConfig(intermediate_size=3, use_bias=True))
    bias = parameter(model, "decoder.layers.0.self_attention.in_proj.bias")
    x, z = torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 30])
    assert bias.fuse([torch.cat((x, z))]).tolist() == [1, 10, 2, 20, 3, 30]


MIXER_ENTRIES: list[Any] = ["full", "swa", "gla", "mamba", ["gla", "swa"], ["gla", "full"], ["swa", "full"]]


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4),
    heads_per_group=st.integers(1, 4),
    half_head=st.integers(1, 4),
    hidden=st.integers(1, 9),
    bias=st.booleans(),
    norm=st.booleans(),
    tied=st.booleans(),
    mixers=st.lists(st.sampled_from(MIXER_ENTRIES), min_size=1, max_size=4),
)
def test_splitting_a_fused_parameter_gives_the_parts_back(
    groups: int,
    heads_per_group: int,
    half_head: int,
    hidden: int,
    bias: bool,
    norm: bool,
    tied: bool,
    mixers: list[Any],
) -> None:
    model = small_model(
        hidden_size=hidden,
        num_attention_heads=groups * heads_per_group,
        num_query_groups=groups,
        kv_channels=2 * half_head,
        add_qkv_bias=bias,
        qk_layernorm=norm,
        share_embeddings_and_output_weights=tied,
        mixers=mixers,
    )
    for entry in model_parameters(model):
        parts = [torch.randn(shape) for shape in entry.hf_shapes]
        fused = entry.fuse(parts)
        assert tuple(fused.shape) == entry.shape
        for part, original in zip(entry.separate(fused), parts, strict=True):
            assert torch.equal(part, original)


def test_names_are_unique_in_both_directions() -> None:
    model = small_model(add_qkv_bias=True, qk_layernorm=True, mixers=["gla", "swa", "full"])
    parameters = list(model_parameters(model))
    names = [entry.name for entry in parameters]
    hf_names = [name for entry in parameters for name in entry.tensors(GLA_SWA)]
    assert len(set(names)) == len(names)
    assert len(set(hf_names)) == len(hf_names)


def test_published_hybrid_has_exactly_the_documented_tensors() -> None:
    """The names of one GLA and one SWA layer as the published SpikingBrain-7B checkpoint spells them."""
    model = small_model(num_layers=2, add_qkv_bias=True, mixers=["gla", "swa"])
    names = {name for entry in model_parameters(model) for name in entry.tensors(GLA_SWA)}
    expected = {"model.embeddings.weight", "model.norm.weight", "lm_head.weight"}
    for layer in (0, 1):
        expected |= {
            f"model.layers.{layer}.attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")
        }
        expected |= {
            f"model.layers.{layer}.{name}.weight"
            for name in (
                "attn_norm",
                "mlp_norm",
                "attn.o_proj",
                "mlp.gate_proj",
                "mlp.up_proj",
                "mlp.down_proj",
            )
        }
    expected |= {
        "model.layers.0.attn.gk_proj.0.weight",
        "model.layers.0.attn.gk_proj.1.weight",
        "model.layers.0.attn.gk_proj.1.bias",
        "model.layers.0.attn.g_norm.weight",
    }
    assert names == expected


def test_a_gate_has_no_place_in_a_dense_family() -> None:
    gate = parameter(small_model(), "decoder.layers.0.self_attention.out_norm.weight")
    with pytest.raises(CheckpointError, match=r"out_norm.weight has no counterpart"):
        gate.tensors(LLAMA)


REVERSED = Transform(
    fuse=lambda parts, model: parts[0].flip(0), split=lambda fused, shapes, model: [fused.flip(0)]
)
"""A layout from outside the package."""


def weight_of(layout: str) -> Parameter:
    weight = Weight("decoder.layers.0.decay", ("decay",), ((3,),), "decays", layout=layout)
    return Parameter(weight, 0, small_model())


def test_a_weight_from_outside_names_its_transform() -> None:
    decay = weight_of(f"{__name__}:REVERSED")
    assert decay.fuse([torch.tensor([1, 2, 3])]).tolist() == [3, 2, 1]
    assert decay.separate(torch.tensor([3, 2, 1]))[0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        (
            "columns",
            "has the layout columns, which is none of rows, query_groups, interleaved_halves and cannot be",
        ),
        (f"{__name__}:MISSING", "write another one as package.module:ATTRIBUTE"),
        (f"{__name__}:weight_of", "which is a function; name a Transform"),
    ],
)
def test_a_layout_that_nobody_knows_is_refused(layout: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        weight_of(layout).fuse([torch.ones(3)])
