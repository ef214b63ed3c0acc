"""The mixer "linear_attention" of a `spikingbrain` model, and its settings under that key of config.json.

Part of the modelling code of a checkpoint.
"""

from __future__ import annotations

from typing import Any

from .cache_gla_swa import RecurrentStateLayer
from .configuration_spikingbrain import SpikingBrainConfig
from .kinds_spikingbrain import MIXERS, Mixer, Place, check_known, with_defaults
from .mixer_settings_spikingbrain import mixer_settings
from .mixers_gla_swa import GLAswaLinearAttention

_KEY = "linear_attention"
_DEFAULTS: dict[str, Any] = {
    "feature_map": "relu",
    "gate": "low_rank",
    "gate_low_rank_dim": 16,
    "gate_logit_normalizer": 16.0,
    "qk_norm": False,
    "num_key_value_heads": None,
    "rotary": False,
    "output_gate": False,
}
"""What settings are where config.json leaves them out."""


def _settings(config: SpikingBrainConfig) -> dict[str, Any]:
    return with_defaults(_KEY, config.linear_attention, _DEFAULTS)


def _check(config: SpikingBrainConfig) -> None:
    settings, heads = _settings(config), config.num_attention_heads
    groups = settings["num_key_value_heads"] or config.num_key_value_heads
    if heads % groups != 0:
        raise ValueError(
            f"num_attention_heads {heads} must be a multiple of num_key_value_heads of {_KEY} {groups}."
        )
    check_known(f"gate of {_KEY}", settings["gate"], ("low_rank", "full_rank", "tied", "fixed"))
    check_known(f"feature_map of {_KEY}", settings["feature_map"], ("relu", "sigmoid"))
    if settings["gate"] == "tied" and settings["feature_map"] != "sigmoid":
        raise ValueError(f"gate tied of {_KEY} is 1 - k: it needs feature_map sigmoid.")


def _attention(config: SpikingBrainConfig, place: Place) -> GLAswaLinearAttention:
    settings = _settings(config)
    num_groups, qk_norm = settings.pop("num_key_value_heads"), settings.pop("qk_norm")
    return GLAswaLinearAttention(
        mixer_settings(config, place, num_groups, qk_norm),
        layer=(place.layer_idx, config.num_hidden_layers),
        **settings,
    )


MIXERS.register(Mixer(_KEY, _attention, cache_layer=lambda config: RecurrentStateLayer(), check=_check))

__all__ = ["GLAswaLinearAttention"]
