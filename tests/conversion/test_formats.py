"""Which Hugging Face format a model goes to, what stands in its way, and how another format joins."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from spikingbrain_train.architecture.mixers import MIXERS
from spikingbrain_train.config.model import (
    FeatureMap,
    GateKind,
    ModelConfig,
    SpikingConfig,
)
from spikingbrain_train.conversion.formats.dense import LLAMA, QWEN2, QWEN3, DenseFormat
from spikingbrain_train.conversion.formats.gla_swa import GLA_SWA
from spikingbrain_train.conversion.formats.registry import (
    FORMATS,
    format_of_model,
    parse_hf_config,
    unsupported,
)
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
TIED_GATE = replace(DENSE.gla, gate=GateKind.tied, feature_map=FeatureMap.sigmoid)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, LLAMA),
        ({"add_qkv_bias": True}, QWEN2),
        ({"qk_layernorm": True}, QWEN3),
        ({"add_qkv_bias": True, "qk_layernorm": True}, GLA_SWA),
        ({"mixers": ["gla", "swa"]}, GLA_SWA),
        ({"mixers": ["swa"]}, GLA_SWA),
        ({"gla": TIED_GATE}, LLAMA),  # no layer has that gate
        ({"spiking": SpikingConfig(k=2.0)}, LLAMA),
    ],
)
def test_the_first_format_that_holds_a_model_takes_it(changes: dict, expected: DenseFormat) -> None:
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
def test_what_stands_in_the_way_is_told_of_the_nearest_format(changes: dict, parts: list[str]) -> None:
    model = replace(DENSE, **changes)
    assert unsupported(model) == parts
    with pytest.raises(CheckpointError, match="only dense models and the SpikingBrain-7B form .* exported"):
        format_of_model(model)


def test_a_kind_that_a_format_does_not_know_stands_in_the_way_by_its_own_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = replace(DENSE, mixers=["gla", "swa"])
    config = GLA_SWA.config(model, None, "float32")
    monkeypatch.setattr(MIXERS["gla"], "hf_layers", {})
    parts = unsupported(replace(model, num_sink_tokens=1))
    assert parts == ["gated linear attention layers", "1 sink tokens"]
    with pytest.raises(ConfigurationError, match="has layers of linear_attention, but no kind"):
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
