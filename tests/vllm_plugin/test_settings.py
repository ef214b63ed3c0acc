"""What the plug-in refuses, before anything is loaded, and where vLLM finds it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import vllm_spikingbrain
from spikingbrain_train.hf.configuration_gla_swa import GLAswaConfig
from spikingbrain_train.hf.modeling_gla_swa import GLAswaForCausalLM
from vllm_spikingbrain.settings import check

ROOT = Path(__file__).resolve().parents[2]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def config(**settings: object) -> GLAswaConfig:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return GLAswaConfig(vocab_size=128, intermediate_size=32, **{**sizes, **settings})


@pytest.mark.parametrize(
    "settings",
    [{}, {"qk_norm": True, "linear_output_gate": True}, {"attention_bias": False, "rope_scaling": YARN}],
)
def test_forms_that_are_computed_pass(settings: dict) -> None:
    check(config(**settings), tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"spiking": {"projections": ["qkv"], "k": 3.0}}, "spiking"),
        ({"w8aspike": {"layout": "published"}}, "w8aspike"),
        ({"linear_rotary": True}, "linear_rotary"),
        ({"linear_gate": "fixed"}, "linear_gate fixed"),
        ({"hidden_act": "relu"}, "hidden_act relu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ],
)
def test_what_would_be_another_model_is_refused_by_name(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"does not compute .*{named}"):
        check(config(**settings))


def test_ranks_that_do_not_divide_the_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size 4 does not divide num_key_value_heads 2"):
        check(config(), tensor_parallel_size=4)


def test_the_plug_in_names_the_class_of_exports_and_vllm_finds_it() -> None:
    assert GLAswaForCausalLM.__name__ == vllm_spikingbrain.ARCHITECTURE
    described = (ROOT / "vllm_spikingbrain/pyproject.toml").read_text()
    assert re.search(
        r'^\[project\.entry-points\."vllm\.general_plugins"\]\n\w+ = "vllm_spikingbrain:register"',
        described,
        re.M,
    )
