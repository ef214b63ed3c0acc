"""config.json is understood in every spelling, and refused where the model would compute something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.architecture.rotary import attention_factor
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.registry import format_of_model, parse_hf_config
from spikingbrain_train.conversion.hf_config import read_hf_config
from spikingbrain_train.conversion.window_convention import WindowConvention
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.hf.configuration_gla_swa import GLAswaConfig
from spikingbrain_train.ops.rotary import scaled_frequencies

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 9}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
# The published SpikingBrain-7B config.json, in small.
GLA_SWA: dict[str, Any] = {
    "architectures": ["GLAswaForCausalLM"],
    "model_type": "gla_swa",
    "auto_map": {
        "AutoConfig": "configuration_gla_swa.GLAswaConfig",
        "AutoModelForCausalLM": "modeling_gla_swa.GLAswaForCausalLM",
    },
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "hidden_act": "swish",
    "norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 4096,
    "attn_mode": "chunk",
    "use_short_conv": False,
    "conv_size": 4,
    "elementwise_affine": True,
    "attention_dropout": 0.0,
    "fuse_cross_entropy": True,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "attn_layers": [1, 3, 5],
}
ORIGINAL = "original_max_position_embeddings"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    **{"rope_type": "longrope", "original_max_position_embeddings": 64},
    **{"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
QWEN3_MOE = LLAMA | {
    **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 8},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 2},
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}
EVERY_FAMILY = [
    LLAMA,
    *(LLAMA | {"rope_scaling": scaling} for scaling in (LLAMA3_ROPE, YARN, LONGROPE)),
    LLAMA | {"attention_bias": True, "mlp_bias": True},
    QWEN3_MOE,
    *(MISTRAL, QWEN2, QWEN2 | WINDOWS, QWEN3, GLA_SWA),
]


def parse(values: dict[str, Any]) -> ModelConfig:
    return parse_hf_config(values, Path("config.json"))[1]


def hf_config(model: ModelConfig, source: dict[str, Any] | None, dtype: str) -> dict[str, Any]:
    return format_of_model(model).config(model, source, dtype)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0},
        {"rope_theta": 500000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_theta": 500000.0, "rope_parameters": {"rope_theta": 500000.0}},
    ],
)
def test_every_spelling_of_the_rotary_base(rope: dict[str, Any]) -> None:
    assert parse(LLAMA | rope).rotary_base == 500000.0
    assert parse(LLAMA | rope).rope_scaling.factor == 1.0


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0}},
        {
            "rope_theta": 500000.0,
            "rope_scaling": {"type" if k == "rope_type" else k: v for k, v in LLAMA3_ROPE.items()},
        },
    ],
)
def test_every_spelling_of_llama3_scaling(rope: dict[str, Any]) -> None:
    model = parse(LLAMA | rope)
    assert model.rotary_base == 500000.0
    assert (model.rope_scaling.factor, model.rope_scaling.original_max_position_embeddings) == (8.0, 64)


@pytest.mark.parametrize(
    ("scaling", "around", "expected"),
    [
        ({"type": "linear", "factor": 2}, {}, {"factor": 2.0}),
        ({"type": "dynamic", "factor": 2.0}, {}, {"original_max_position_embeddings": 128}),
        (YARN, {}, {"factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": None}),
        ({"rope_type": "yarn", "factor": None}, {ORIGINAL: 64}, {"factor": 2.0, ORIGINAL: 64}),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, {}, {"attention_factor": 1.0}),
        (YARN | {"beta_fast": None}, {ORIGINAL: 16}, {"beta_fast": 32.0, ORIGINAL: 16}),
        (LONGROPE, {}, {"factor": 2.0, "long_factor": [1.0, 2.0, 3.0, 4.0]}),
        (LONGROPE | {"attention_factor": 1.5}, {ORIGINAL: 32}, {"factor": 4.0, "attention_factor": 1.5}),
    ],
)
def test_what_spellings_of_scaling_leave_open_is_what_transformers_makes_of_it(
    scaling: dict[str, Any], around: dict[str, Any], expected: dict[str, Any]
) -> None:
    source = LLAMA | {"rope_theta": 1e4, "rope_scaling": scaling} | around
    model = parse(source)
    found = vars(model.rope_scaling)
    assert {name: found[name] for name in expected} == expected
    known = {key: value for key, value in source.items() if key not in ("architectures", "model_type")}
    config = LlamaConfig(**json.loads(json.dumps(known)))
    frequencies, factor = ROPE_INIT_FUNCTIONS[model.rope_scaling.rope_type.value](config, "cpu")
    assert factor == pytest.approx(attention_factor(model.rope_scaling), rel=1e-12)
    unscaled = 1e4 ** (-torch.arange(0, 8, 2) / 8)
    ours = scaled_frequencies(unscaled, 1e4, model.rope_scaling)
    torch.testing.assert_close(ours, frequencies, rtol=1e-6, atol=0)
    assert hf_config(model, source, "float32") == source | {"dtype": "float32"}
    model.max_position_embeddings = 1024  # a later stage: written anew, in the source's spelling
    assert parse(hf_config(model, source, "float32")).rope_scaling == model.rope_scaling


def test_families_differ_in_bias_norm_and_head_width() -> None:
    llama, qwen2, qwen3 = parse(LLAMA), parse(QWEN2), parse(QWEN3)
    assert [m.add_qkv_bias for m in (llama, qwen2, qwen3)] == [False, True, False]
    assert [m.qk_layernorm for m in (llama, qwen2, qwen3)] == [False, False, True]
    assert [m.kv_channels for m in (llama, qwen2, qwen3)] == [
        8,
        8,
        128,
    ]  # 128: transformers' default of Qwen3


def test_published_hybrid() -> None:
    model = parse(GLA_SWA)
    assert model.mixers == ["gla", "swa"]
    assert model.add_qkv_bias
    assert (model.gla.gate_low_rank_dim, model.gla.gate_logit_normalizer) == (16, 16.0)
    del_layers = {key: value for key, value in GLA_SWA.items() if key != "attn_layers"}
    assert parse(del_layers) == model  # the published class recomputes attn_layers as the odd ones


@pytest.mark.parametrize(
    ("base", "change", "sentence"),
    [
        (LLAMA, {"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM is not supported"),
        (LLAMA, {"architectures": ["LlamaModel"]}, "LlamaModel is not supported"),
        (LLAMA, {"architectures": None, "model_type": "gpt2"}, "architectures must name one of"),
        (LLAMA, {"architectures": "LlamaForCausalLM"}, "architectures must name one of"),
        (QWEN2, {"attention_bias": True}, "attention_bias = true is not read by Qwen2ForCausalLM"),
        (QWEN3, {"mlp_bias": True}, "mlp_bias = true is not read by Qwen3ForCausalLM"),
        (LLAMA, {"hidden_act": "gelu"}, 'hidden_act = "gelu" is not supported'),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "proportional", "factor": 4.0}},
            "rope_scaling .* unsupported rope_type",
        ),
        (LLAMA, {"rope_parameters": {"rope_type": ["yarn"]}}, "rope_parameters .* unsupported"),
        (LLAMA, {"rope_scaling": {"rope_type": "dynamic"}}, "factor is missing"),
        (LLAMA, {"rope_scaling": LONGROPE | {"long_factor": [1.0]}}, "long_factor = .* must list 4 numbers"),
        (LLAMA, {"rope_scaling": LONGROPE | {"short_factor": [1, 1, 0, 1]}}, "short_factor = 0 must be"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
        (
            LLAMA,
            {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}},
            "rope_theta = 1.0 contradicts",
        ),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one set of rotary settings"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "import the unquantised checkpoint"),
        (LLAMA, {"compression_config": {"bits": 4}}, "import the unquantised checkpoint"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide num_attention_heads"),
        (LLAMA, {"hidden_size": "32"}, 'hidden_size = "32" must be a whole number'),
        (LLAMA, {"hidden_size": 30}, "hidden_size = 30 is not divisible"),
        (LLAMA, {"vocab_size": 0}, "vocab_size = 0 must be a whole number of at least 1"),
        (LLAMA, {"num_hidden_layers": None}, "num_hidden_layers is missing"),
        (LLAMA, {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        (LLAMA, {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        (LLAMA, {"use_sliding_window": True, "max_window_layers": 2}, "which LlamaForCausalLM does not have"),
        (MISTRAL, {"layer_types": ["full_attention"] * 4}, "is not read by MistralForCausalLM"),
        (QWEN3_MOE, {"use_sliding_window": True, "max_window_layers": 48}, "use_sliding_window = true gives"),
        (QWEN3_MOE, {"num_experts": None}, "num_local_experts is missing"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window = 0 must be a whole number of at least 1"),
        (QWEN2, {"max_window_layers": -1, "use_sliding_window": True}, "whole number of at least 0"),
        (QWEN2, {"layer_types": 3}, "layer_types = 3 must list"),
        (QWEN2, {"layer_types": ["full_attention"] * 3}, "layer_types .* for 4 layers"),
        (QWEN2, {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "must list full_attention"),
        (
            QWEN2,
            {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
            "layer_types .* without use_sliding_window = true",
        ),
        (GLA_SWA, {"use_short_conv": True}, "use_short_conv = true is not supported"),
        (GLA_SWA, {"elementwise_affine": False}, "elementwise_affine"),
        (GLA_SWA, {"attn_layers": [1, 6]}, "attn_layers .* below num_hidden_layers = 6"),
        (GLA_SWA, {"full_attention_layers": [0]}, "full_attention_layers .* attn_layers"),
        (GLA_SWA, {"linear_num_key_value_heads": 3}, "linear_num_key_value_heads = 3 must divide"),
        (GLA_SWA, {"linear_gate": "tied"}, 'linear_gate = "tied" is not supported'),
        (GLA_SWA, {"quant_weight_group_size": 128}, "W8ASpike"),
        (GLA_SWA, {"attention_window": 9, "sliding_window": 3}, "sliding_window = 3 contradicts"),
        (GLA_SWA, {"attention_window": 9, "sliding_window": 9}, "contradicts attention_window = 9"),
        (GLA_SWA, {"attention_window": 8, "sliding_window": None}, "sliding_window = null contradicts"),
    ],
)
def test_what_would_be_computed_differently_is_refused(
    base: dict[str, Any], change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        parse(base | change)


def test_a_window_beyond_the_last_layer_is_none() -> None:
    """Qwen2.5 ships use_sliding_window false, others true with max_window_layers = num_hidden_layers."""
    assert parse(QWEN2 | {"use_sliding_window": True, "max_window_layers": 4}).mixers == ["full"]


@pytest.mark.parametrize("max_window_layers", [0, 2, 4])
@pytest.mark.parametrize("use_sliding_window", [True, False])
@pytest.mark.parametrize("sliding_window", [{}, {"sliding_window": 8}, {"sliding_window": None}])
def test_layers_have_a_window_exactly_where_transformers_has_one(
    max_window_layers: int, use_sliding_window: bool, sliding_window: dict[str, Any]
) -> None:
    windows = sliding_window | {
        "use_sliding_window": use_sliding_window,
        "max_window_layers": max_window_layers,
    }
    # transformers 5 takes the type from the class.
    known = {key: value for key, value in QWEN2.items() if key not in ("architectures", "model_type")}
    theirs = Qwen2Config(**known, **windows)
    model = parse(QWEN2 | windows)
    kinds = {"full_attention": None, "sliding_attention": theirs.sliding_window}
    seen = [layer.mixers[0].window(model) for layer in layers(model)]
    assert seen == [kinds[name] for name in theirs.layer_types]


def test_layers_may_be_listed() -> None:
    listed = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    model = parse(QWEN3 | {"layer_types": listed, "use_sliding_window": True, "sliding_window": 5})
    assert (model.layer_mixers(), model.sliding_window) == ([("swa",), ("full",), ("full",), ("swa",)], 5)
    written = hf_config(model, None, "float32")
    assert (written["layer_types"], written["use_sliding_window"]) == (listed, True)


def test_mistral_has_a_window_in_all_layers_or_none() -> None:
    assert (parse(MISTRAL).mixers, parse(MISTRAL).sliding_window) == (["swa"], 9)
    without = parse(MISTRAL | {"sliding_window": None})
    assert without.mixers == ["full"]
    absent = parse({key: value for key, value in MISTRAL.items() if key != "sliding_window"})
    assert absent.sliding_window == MistralConfig().sliding_window
    assert format_of_model(without).architecture == "LlamaForCausalLM"
    assert format_of_model(without, source=MISTRAL).architecture == "MistralForCausalLM"


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "\udcff", "[" * 100000])
def test_malformed_json_is_refused_with_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize("config", EVERY_FAMILY[:-1])
def test_an_unchanged_model_keeps_its_config(config: dict[str, Any]) -> None:
    assert hf_config(parse(config), config, "float32") == config | {"dtype": "float32"}


def test_an_unchanged_published_model_keeps_its_keys_beside_those_of_this_project() -> None:
    published = GLA_SWA | {"attn_mode": "fused_chunk", "fuse_cross_entropy": False}
    written = hf_config(parse(published), published, "float32")
    assert {key: written[key] for key in published} == published
    assert (written["dtype"], written["torch_dtype"]) == ("float32", "float32")
    assert written["attention_window"] == GLA_SWA["sliding_window"] + 1


@pytest.mark.parametrize(("convention", "window"), [(None, 4097), ("published", 4097), ("inclusive", 4096)])
def test_the_window_of_a_published_config_is_read_as_chosen(convention: str | None, window: int) -> None:
    chosen = convention and WindowConvention(convention)
    assert parse_hf_config(GLA_SWA, Path("config.json"), chosen)[1].sliding_window == window
    explicit = GLA_SWA | {"attention_window": 99, "sliding_window": 98}
    assert parse_hf_config(explicit, Path("config.json"), chosen)[1].sliding_window == 99


REFERENCES = {
    "auto_map": {"AutoModelForCausalLM": "owner/repository--modeling.Model"},
    "custom_pipelines": {"text-generation": {"impl": "pipeline.Pipeline"}},
    "attn_implementation": "owner/kernel",
    "_attn_implementation": "owner/kernel",
    "experts_implementation": "owner/experts",
    "_experts_implementation": "owner/experts",
}


@pytest.mark.parametrize("config", EVERY_FAMILY)
def test_code_and_kernels_that_a_source_names_are_not_repeated(config: dict[str, Any]) -> None:
    inside = {"text_config": {"kept": 1, "_attn_implementation": "owner/kernel"}}
    written = hf_config(parse(config), config | REFERENCES | inside, "float32")
    own = {key: written.pop(key) for key in REFERENCES if key in written}
    assert own == ({"auto_map": GLA_SWA["auto_map"]} if config is GLA_SWA else {})
    assert "owner" not in json.dumps(written)
    assert written["text_config"] == {"kept": 1}


@pytest.mark.parametrize("config", EVERY_FAMILY)
def test_a_config_written_from_nothing_means_the_same(config: dict[str, Any]) -> None:
    model = parse(config)
    written = hf_config(model, None, "float32")
    assert written["architectures"] == config["architectures"]
    assert parse(json.loads(json.dumps(written))) == model


@pytest.mark.parametrize("rope", [{"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e4}}])
def test_a_longer_context_is_written_over_the_source(rope: dict[str, Any]) -> None:
    """A later stage may raise the rotary base; the export says so in whatever spelling the source has."""
    model = parse(LLAMA | rope)
    model.rotary_base, model.max_position_embeddings = 5e6, 4096
    written = hf_config(model, LLAMA | rope, "bfloat16")
    assert parse(written).rotary_base == 5e6
    assert parse(written).max_position_embeddings == 4096
    assert written.keys() >= rope.keys()


def test_a_hybrid_takes_token_ids_from_its_source() -> None:
    model = parse(QWEN2)
    model.mixers = ["gla", "swa"]
    written = hf_config(model, QWEN2 | {"eos_token_id": [7, 8], "rope_theta": 1e4}, "bfloat16")
    assert written["eos_token_id"] == [7, 8]
    assert written["attn_layers"] == [1, 3]
    assert written["model_type"] == "gla_swa"


def test_a_window_may_stand_under_either_key_alone() -> None:
    published = {key: value for key, value in GLA_SWA.items() if key != "sliding_window"}
    assert parse(published | {"attention_window": 9}).sliding_window == 9
    assert parse(published | {"sliding_window": 8}).sliding_window == 9


@pytest.mark.parametrize("config", [LLAMA, MISTRAL, QWEN2, QWEN3, GLA_SWA], ids=lambda x: x["model_type"])
def test_an_absent_rotary_base_is_that_of_the_class(config: dict[str, Any]) -> None:
    own = {"gla_swa": GLAswaConfig, "llama": LlamaConfig, "mistral": MistralConfig}
    own |= {"qwen2": Qwen2Config, "qwen3": Qwen3Config}
    known = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_parameters")}
    made = own[config["model_type"]]()
    base = made.rope_theta if hasattr(made, "rope_theta") else made.rope_parameters["rope_theta"]
    assert parse(known).rotary_base == base
