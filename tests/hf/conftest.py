"""Small random models in the exported format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from spikingbrain_train.hf.configuration_gla_swa import GLAswaConfig
from spikingbrain_train.hf.modeling_gla_swa import GLAswaForCausalLM


@pytest.fixture
def tiny_config() -> Callable[..., GLAswaConfig]:
    """GLA, SWA, GLA, SWA with a window of 7; keyword arguments replace settings."""

    def make(**changes: Any) -> GLAswaConfig:
        settings: dict[str, Any] = {
            "vocab_size": 97,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "attention_window": 7,
            "max_position_embeddings": 1024,
            "rope_theta": 10000.0,
        }
        if "sliding_window" in changes:
            del settings["attention_window"]
        return GLAswaConfig(**{**settings, **changes})

    return make


@pytest.fixture
def random_model(tiny_config: Callable[..., GLAswaConfig]) -> Callable[..., GLAswaForCausalLM]:
    """A model whose every tensor is far from its default, so that a missing one shows in the logits."""

    def make(seed: int = 0, **changes: Any) -> GLAswaForCausalLM:
        model = GLAswaForCausalLM(tiny_config(**changes))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 1.0 + 0.3 * noise if "norm" in name else 0.25 * noise
            if "gk_proj.1.bias" in name:
                # Decays of a token from 0.3 to 1, so that both forgetting and remembering matter.
                parameter.data = 10.0 * noise
        return model.eval()

    return make
