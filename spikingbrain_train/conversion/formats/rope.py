"""Rotary positions in config.json: ``rope_theta``, ``rope_scaling``, transformers 5's ``rope_parameters``."""

from __future__ import annotations

from typing import Any

from spikingbrain_train.config.model import RopeScalingConfig
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys


def read_rope(keys: ConfigKeys, rope_theta: float) -> tuple[float, RopeScalingConfig]:
    """Rotary base and scaling.

    Args:
        keys: a config.json.
        rope_theta: the base where it names none.

    Raises:
        CheckpointError: the rotary positions are none that this model computes.
    """
    values = keys.values
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = ConfigKeys(values.get(key) or {}, keys.path) if isinstance(values.get(key) or {}, dict) else None
    if rope is None or any(isinstance(value, dict) for value in rope.values.values()):
        raise keys.refuse(key, "must be one set of rotary settings for all layers")
    for section in (keys, rope):
        if section.values.get("partial_rotary_factor", 1.0) != 1.0:
            raise section.refuse(
                "partial_rotary_factor", "is not supported; rotary positions cover the whole head"
            )
    base = keys.number("rope_theta", rope.number("rope_theta", rope_theta))
    if rope.number("rope_theta", base) != base:
        raise keys.refuse(
            "rope_theta", f"contradicts rope_theta = {rope.values['rope_theta']} in {key}; keep one"
        )
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind == "default":
        return base, RopeScalingConfig()
    if kind != "llama3":
        raise keys.refuse(key, 'has an unsupported rope_type; supported are "default" and "llama3"')
    return base, RopeScalingConfig(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
    )


def scaling_values(scaling: RopeScalingConfig) -> dict[str, Any] | None:
    """The frequency scaling as config.json has it; None where there is none."""
    if scaling.factor == 1.0:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
