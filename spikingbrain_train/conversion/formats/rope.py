"""Rotary positions in config.json: ``rope_theta``, ``rope_scaling``, transformers 5's ``rope_parameters``.

Where spellings leave something open, it is what transformers makes of it: a missing original context is the
declared one, a missing factor the ratio of both, and YaRN's two magnitudes become one attention factor.
"""

from __future__ import annotations

import math
from typing import Any

from spikingbrain_train.architecture.rotary import settings_of_type
from spikingbrain_train.config.rope_scaling import RopeScalingConfig, RopeType
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys

ORIGINAL = "original_max_position_embeddings"
_WORDS = {
    RopeType.linear: "linear",
    RopeType.dynamic: "dynamic",
    RopeType.yarn: "YaRN's",
    RopeType.llama3: "Llama 3's",
    RopeType.longrope: "LongRoPE's",
}


def read_rope(
    keys: ConfigKeys, rope_theta: float, max_position_embeddings: int, kv_channels: int
) -> tuple[float, RopeScalingConfig]:
    """Rotary base and scaling.

    Args:
        keys: a config.json.
        rope_theta: the base where it names none.
        max_position_embeddings: tokens that the model is declared for.
        kv_channels: width of a head.

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
    if not isinstance(kind, str) or kind not in RopeType.__members__:
        names = ", ".join(f'"{name}"' for name in RopeType.__members__)
        raise keys.refuse(key, f"has an unsupported rope_type; supported are {names}")
    return base, _scaling(RopeType[kind], rope, keys, max_position_embeddings, kv_channels)


def _scaling(
    kind: RopeType, rope: ConfigKeys, keys: ConfigKeys, max_position_embeddings: int, kv_channels: int
) -> RopeScalingConfig:
    scaling = RopeScalingConfig(rope_type=kind)
    if kind is RopeType.default:
        return scaling
    if kind is RopeType.dynamic:
        scaling.original_max_position_embeddings = max_position_embeddings
    elif kind is not RopeType.linear:
        inside = rope.integer(ORIGINAL, max_position_embeddings)
        scaling.original_max_position_embeddings = keys.integer(ORIGINAL, inside)
    ratio = max_position_embeddings / scaling.original_max_position_embeddings
    has_default = kind in (RopeType.yarn, RopeType.longrope) and ratio >= 1
    scaling.factor = rope.number("factor", ratio if has_default else None)
    if kind is RopeType.llama3:
        scaling.low_freq_factor = rope.number("low_freq_factor")
        scaling.high_freq_factor = rope.number("high_freq_factor")
    elif kind is RopeType.yarn:
        scaling.beta_fast = rope.number("beta_fast", scaling.beta_fast)
        scaling.beta_slow = rope.number("beta_slow", scaling.beta_slow)
        scaling.truncate = rope.boolean("truncate", scaling.truncate)
        scaling.attention_factor = _magnitude_of_yarn(rope, scaling.factor)
    elif kind is RopeType.longrope:
        scaling.short_factor = rope.numbers("short_factor", kv_channels // 2)
        scaling.long_factor = rope.numbers("long_factor", kv_channels // 2)
        if rope.values.get("attention_factor") is not None:
            scaling.attention_factor = rope.number("attention_factor")
    return scaling


def _magnitude_of_yarn(rope: ConfigKeys, factor: float) -> float | None:
    """What config.json says of the attention factor; None where it leaves it to YaRN."""
    if rope.values.get("attention_factor") is not None:
        return rope.number("attention_factor")
    if not (rope.values.get("mscale") and rope.values.get("mscale_all_dim")):
        return None
    own, of_all = (
        0.1 * rope.number(name) * math.log(factor) + 1.0 if factor > 1 else 1.0
        for name in ("mscale", "mscale_all_dim")
    )
    return own / of_all


def scaling_values(scaling: RopeScalingConfig) -> dict[str, Any] | None:
    """The frequency scaling as config.json has it; None where there is none.

    transformers takes the original context of ``dynamic`` from max_position_embeddings: it has no key.
    """
    if scaling.rope_type is RopeType.default:
        return None
    plain = RopeScalingConfig()
    optional = ("attention_factor", "beta_fast", "beta_slow", "truncate")
    values = {name: getattr(scaling, name) for name in settings_of_type(scaling)}
    if scaling.rope_type is RopeType.dynamic:
        values.pop(ORIGINAL)
    return {"rope_type": scaling.rope_type.value} | {
        name: list(value) if isinstance(value, list) else value
        for name, value in values.items()
        if name not in optional or value != getattr(plain, name)
    }


def declared_positions(scaling: RopeScalingConfig, max_position_embeddings: int) -> int:
    """What config.json has to say under max_position_embeddings: ``dynamic`` is scaled from there on."""
    if scaling.rope_type is RopeType.dynamic:
        return scaling.original_max_position_embeddings
    return max_position_embeddings


def words_of(scaling: RopeScalingConfig) -> str:
    """What sentences call it: ``Llama 3's rotary scaling``."""
    return f"{_WORDS.get(scaling.rope_type, 'no')} rotary scaling"
