"""Presets of published models are what an import of their config.json gives, as large as transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.conversion.formats.registry import parse_hf_config
from spikingbrain_train.planning.costs import total_parameters

_OF_MAMBA = {
    "conv_kernel": 4,
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "layer_norm_epsilon": 1e-5,
    "state_size": 16,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "use_bias": False,
    "use_conv_bias": True,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    # tiiuae/falcon-mamba-7b
    "falcon_mamba_7b": _OF_MAMBA
    | {
        "architectures": ["FalconMambaForCausalLM"],
        "model_type": "falcon_mamba",
        "expand": 16,  # transformers computes with intermediate_size
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "num_hidden_layers": 64,
        "tie_word_embeddings": False,
        "time_step_rank": 256,
        "vocab_size": 65024,
    },
    # state-spaces/mamba-130m-hf
    "mamba_130m": _OF_MAMBA
    | {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "expand": 2,
        "hidden_size": 768,
        "intermediate_size": 1536,
        "num_hidden_layers": 24,
        "tie_word_embeddings": True,
        "time_step_rank": 48,
        "vocab_size": 50280,
    },
    # microsoft/bitnet-b1.58-2B-4T
    "bitnet_2b4t": {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "hidden_act": "relu2",
        "hidden_size": 2560,
        "initializer_range": 0.02,
        "intermediate_size": 6912,
        "max_position_embeddings": 4096,
        "num_attention_heads": 20,
        "num_hidden_layers": 30,
        "num_key_value_heads": 5,
        "quantization_config": {
            "linear_class": "autobitlinear",
            "quant_method": "bitnet",
            "quantization_mode": "offline",
        },
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
}
"""What config.json of each says about its network."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_what_an_import_of_the_published_config_gives(name: str) -> None:
    preset = to_run_config(compose_run([f"model={name}", "dry_run=true"])).model
    _, imported = parse_hf_config(PUBLISHED[name], Path("config.json"))
    assert imported == preset


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_as_many_parameters_as_the_class_of_transformers(name: str) -> None:
    preset = to_run_config(compose_run([f"model={name}", "dry_run=true"])).model
    said = {key: value for key, value in PUBLISHED[name].items() if key != "quantization_config"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(said.pop("model_type"), **said))
    assert total_parameters(preset) == sum(each.numel() for each in model.parameters())
