"""Settings of rotary positions, of every kind of mixer that turns its queries and keys by them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from spikingbrain_train.config.enum_tables import entry_of
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.require import require
from spikingbrain_train.config.rope_scaling import RopeScalingConfig, RopeType

SETTINGS_OF_TYPES: Mapping[RopeType, tuple[str, ...]] = {
    RopeType.default: (),
    RopeType.linear: ("factor",),
    RopeType.dynamic: ("factor", "original_max_position_embeddings"),
    RopeType.yarn: (
        *("factor", "original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "truncate"),
    ),
    RopeType.llama3: (
        *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    ),
    RopeType.longrope: (
        *("factor", "original_max_position_embeddings", "attention_factor"),
        *("short_factor", "long_factor"),
    ),
}
"""What each kind of scaling reads of :class:`RopeScalingConfig`."""


def settings_of_type(scaling: RopeScalingConfig) -> tuple[str, ...]:
    """Names of what a scaling reads beside its ``rope_type``."""
    return entry_of(scaling.rope_type, SETTINGS_OF_TYPES, "the settings of rotary scaling")


def all_rotary_settings(model: ModelConfig) -> set[str]:
    """Dotted names of what decides the angles."""
    return {"rotary_base", *(f"rope_scaling.{name}" for name in vars(model.rope_scaling))}


def rotary_settings(model: ModelConfig) -> set[str]:
    """Those that have a part in ``model``."""
    names = ("rope_type", *settings_of_type(model.rope_scaling))
    return {"rotary_base", *(f"rope_scaling.{name}" for name in names)}


def depends_on_length(scaling: RopeScalingConfig) -> bool:
    """Whether a text's angles depend on how long it is."""
    return scaling.rope_type in (RopeType.dynamic, RopeType.longrope)


def attention_factor(scaling: RopeScalingConfig) -> float:
    """What turned queries and keys of softmax attention are multiplied by, each.

    1 but for YaRN (arXiv 2309.00071, section 3.4) and LongRoPE (arXiv 2402.13753, section 3.3). Linear
    attention leaves it out: its features are normed behind the recurrence.
    """
    factor = scaling.factor
    if scaling.rope_type not in (RopeType.yarn, RopeType.longrope):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if factor <= 1:
        return 1.0
    if scaling.rope_type is RopeType.yarn:
        return 0.1 * math.log(factor) + 1.0
    return math.sqrt(1 + math.log(factor) / math.log(scaling.original_max_position_embeddings))


def softmax_scale(model: ModelConfig) -> float:
    """What scores of softmax attention are multiplied by."""
    return model.kv_channels**-0.5 * attention_factor(model.rope_scaling) ** 2


def check_rotary(model: ModelConfig) -> None:
    """Heads are made of pairs of channels, and lists have a factor for each. Raises ConfigurationError."""
    width, scaling = model.kv_channels, model.rope_scaling
    require(
        width % 2 == 0,
        f"model.kv_channels={width} is odd, but rotary positions turn pairs of channels; use an even number",
    )
    require(
        scaling.rope_type is not RopeType.dynamic or width > 2,
        f"model.rope_scaling.rope_type=dynamic needs heads of more than model.kv_channels={width} channels",
    )
    for name in ("short_factor", "long_factor"):
        number = len(getattr(scaling, name))
        require(
            scaling.rope_type is not RopeType.longrope or number == width // 2,
            f"model.rope_scaling.{name} lists {number} factors, but rope_type=longrope needs one for each of "
            f"the {width // 2} pairs of model.kv_channels={width}",
        )
