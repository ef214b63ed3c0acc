"""Settings of rotary positions, of every kind of mixer that turns its queries and keys by them."""

from __future__ import annotations

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.require import require


def all_rotary_settings(model: ModelConfig) -> set[str]:
    """Dotted names of what decides the angles."""
    return {"rotary_base", *(f"rope_scaling.{name}" for name in vars(model.rope_scaling))}


def rotary_settings(model: ModelConfig) -> set[str]:
    """Those that have a part in ``model``: a factor of 1 scales nothing."""
    is_scaled = model.rope_scaling.factor != 1
    return all_rotary_settings(model) if is_scaled else {"rotary_base", "rope_scaling.factor"}


def check_rotary(model: ModelConfig) -> None:
    """Heads are made of pairs of channels. Raises ConfigurationError."""
    require(
        model.kv_channels % 2 == 0,
        f"model.kv_channels={model.kv_channels} is odd, but rotary positions turn pairs of channels; "
        f"use an even number",
    )
