"""Which Hugging Face format a model goes to, what stands in its way, and how another format joins."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from spikingbrain_train.architecture.mixers import MIXERS
from spikingbrain_train.config.linear_transforms import Projection, SpikingConfig
from spikingbrain_train.config.model import FeatureMap, GateKind, ModelConfig, MoEConfig
from spikingbrain_train.conversion.formats.dense import LLAMA, MISTRAL, QWEN2, QWEN3, DenseFormat
from spikingbrain_train.conversion.formats.gla_swa import GLA_SWA
from spikingbrain_train.conversion.formats.hf_format import HfFormat
from spikingbrain_train.conversion.formats.registry import (
    FORMATS,
    format_of_model,
    parse_hf_config,
    unsupported,
)
from spikingbrain_train.conversion.formats.spikingbrain import SPIKINGBRAIN
from spikingbrain_train.errors import CheckpointError, ConfigurationError

DENSE = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=128,
    max_position_embeddings=64,
    mixers=["full"],
)
SPIKES = SpikingConfig([Projection.qkv, Projection.gate], k=2.0)
TIED_GATE = replace(DENSE.gla, gate=GateKind.tied, feature_map=FeatureMap.sigmoid)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, LLAMA),
        ({"add_qkv_bias": True}, QWEN2),
        ({"qk_layernorm": True}, QWEN3),
        ({"add_qkv_bias": True, "qk_layernorm": True}, GLA_SWA),
        ({"mixers": ["gla", "swa"]}, GLA_SWA),
        ({"mixers": ["swa"]}, MISTRAL),
        ({"mixers": ["swa", "full"]}, GLA_SWA),
        ({"mixers": ["swa", "full"], "add_qkv_bias": True}, QWEN2),
        ({"add_qkv_bias": True, "add_output_bias": True, "add_mlp_bias": True}, LLAMA),
        ({"mixers": ["gla", "swa"], "add_mlp_bias": True}, SPIKINGBRAIN),
        ({"attn_sub_norm": True}, SPIKINGBRAIN),
        ({"mixers": ["gla", "swa"], "ffn_sub_norm": True}, SPIKINGBRAIN),
        ({"gla": TIED_GATE}, LLAMA),  # no layer has that gate
        ({"spiking": SpikingConfig(k=2.0)}, LLAMA),
        ({"spiking": SPIKES, "mixers": ["gla", "swa"]}, GLA_SWA),
        ({"spiking": SPIKES}, GLA_SWA),  # no class of transformers computes them
        ({"num_sink_tokens": 3}, SPIKINGBRAIN),
        ({"feed_forwards": ["dense", "moe"]}, SPIKINGBRAIN),
        ({"mixers": ["gla"], "gla": TIED_GATE}, SPIKINGBRAIN),
        ({"mixers": [["gla", "full"], "swa"]}, SPIKINGBRAIN),
    ],
)
def test_the_first_format_that_holds_a_model_takes_it(changes: dict, expected: HfFormat) -> None:
    model = replace(DENSE, **changes)
    assert format_of_model(model) is expected
    assert unsupported(model) == []


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_sink_tokens": 3}, ["3 sink tokens"]),
        (
            {"add_qkv_bias": True, "feed_forwards": ["moe"], "num_sink_tokens": 3},
            ["mixture-of-experts layers", "3 sink tokens"],
        ),
        ({"mixers": ["gla"], "gla": TIED_GATE}, ["gla.gate=tied", "gla.feature_map=sigmoid"]),
        (
            {"mixers": [["gla", "full"]], "gla": TIED_GATE},
            ["layers with two branches ([gla,full])", "gla.gate=tied", "gla.feature_map=sigmoid"],
        ),
    ],
)
def test_what_stands_in_the_way_of_a_format_that_is_asked_for(changes: dict, parts: list[str]) -> None:
    model = replace(DENSE, **changes)
    assert GLA_SWA.unsupported(model) == parts
    with pytest.raises(CheckpointError, match="--format gla_swa cannot hold .*; leave --format out"):
        format_of_model(model, "gla_swa")
    assert unsupported(model) == []
    assert format_of_model(model) is format_of_model(model, "spikingbrain") is SPIKINGBRAIN


def test_a_format_that_is_asked_for_is_taken_or_unknown() -> None:
    assert format_of_model(replace(DENSE, spiking=SPIKES), "llama").leaves_out(replace(DENSE, spiking=SPIKES))
    assert format_of_model(DENSE, "spikingbrain") is SPIKINGBRAIN
    with pytest.raises(ConfigurationError, match="--format gpt2 is no Hugging Face format here; known are"):
        format_of_model(DENSE, "gpt2")


def test_a_kind_that_no_format_knows_stands_in_the_way_by_its_own_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = replace(DENSE, mixers=["gla", "swa"])
    config = GLA_SWA.config(model, None, "float32")
    monkeypatch.setattr(MIXERS["gla"], "hf_layers", {})
    sinks = replace(model, num_sink_tokens=1)
    assert unsupported(sinks) == ["gated linear attention layers"]
    assert GLA_SWA.unsupported(sinks) == ["gated linear attention layers", "1 sink tokens"]
    with pytest.raises(CheckpointError, match="no Hugging Face format holds gated linear attention layers;"):
        format_of_model(sinks)
    with pytest.raises(ConfigurationError, match="has layers of linear_attention, but no kind"):
        parse_hf_config(config, Path("config.json"))


EVERYTHING = replace(
    DENSE,
    num_layers=4,
    mixers=[["gla", "swa"], "gla", ["gla", "swa", "full"], "full"],
    feed_forwards=["dense", "moe"],
    gla=replace(TIED_GATE, qk_norm=True, rotary=True, output_gate=True, num_query_groups=4),
    moe=MoEConfig(num_experts=3, router_topk=2, num_shared_experts=0, moe_ffn_hidden_size=24),
    num_sink_tokens=5,
    sliding_window=9,
    spiking=replace(SPIKES, k=1.5),
    add_qkv_bias=True,
    add_output_bias=True,
    add_mlp_bias=True,
    share_embeddings_and_output_weights=True,
)


@pytest.mark.parametrize("model", [EVERYTHING, DENSE], ids=["everything", "dense"])
def test_the_own_format_says_all_that_a_model_is(model: ModelConfig) -> None:
    config = json.loads(json.dumps(SPIKINGBRAIN.config(model, None, "float32")))
    assert parse_hf_config(config, Path("config.json")) == (SPIKINGBRAIN, model)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mixers": None}, "mixers = null must hold a list of names for each of num_hidden_layers = 4"),
        ({"mixers": [["gla"]] * 4}, "has layers of gla, but no kind"),
        ({"mixers": [[3]] * 4}, "must hold a list of names"),
        ({"feed_forwards": ["mlp"]}, "must hold a name for each"),
        (
            {"linear_attention": {"gate": "open"}},
            'gate = "open" must be one of low_rank, full_rank, tied, fixed',
        ),
        ({"linear_attention": 3}, "linear_attention = 3 must hold settings by name"),
        ({"moe": {"num_experts": 0}}, "num_experts = 0 must be a whole number of at least 1"),
        ({"spiking": {"k": 3}}, "projections = null must list some of qkv, gate"),
        ({"spiking": {"k": -1, "projections": ["qkv"]}}, "k = -1 must be a number above 0"),
        ({"spiking": {"k": 3, "projections": ["qkv"], "gate_encoding": 1}}, "must be once or each_matrix"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ],
)
def test_an_own_config_that_says_something_else_is_refused(changes: dict, sentence: str) -> None:
    config = SPIKINGBRAIN.config(EVERYTHING, None, "float32") | changes
    with pytest.raises((CheckpointError, ConfigurationError), match=sentence):
        parse_hf_config(config, Path("config.json"))


def test_another_format_is_an_entry_of_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    both = DenseFormat("BothForCausalLM", "both", add_qkv_bias=True, qk_layernorm=True)
    monkeypatch.setattr("spikingbrain_train.conversion.formats.registry.FORMATS", [both, *FORMATS])
    model = replace(DENSE, add_qkv_bias=True, qk_layernorm=True)
    assert format_of_model(model) is both
    config = both.config(model, None, "float32")
    assert config["architectures"] == ["BothForCausalLM"]
    assert parse_hf_config(config, Path("config.json")) == (both, model)


def test_formats_need_no_torch() -> None:
    code = "import sys, spikingbrain_train.conversion.formats.registry; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
