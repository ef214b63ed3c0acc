"""The mixers "full_attention" and "sliding_attention" of a `spikingbrain` model.

Part of the modelling code of a checkpoint.
"""

from __future__ import annotations

from .cache_gla_swa import KeyValueLayer
from .configuration_spikingbrain import SpikingBrainConfig
from .kinds_spikingbrain import MIXERS, Mixer, Place
from .mixer_settings_spikingbrain import mixer_settings
from .mixers_gla_swa import GLAswaSoftmaxAttention


def _window(config: SpikingBrainConfig) -> int:
    return config.sliding_window


def _attention(config: SpikingBrainConfig, place: Place, window: int | None) -> GLAswaSoftmaxAttention:
    factor = config.rotary_positions().attention_factor ** 2
    settings = mixer_settings(config, place)
    return GLAswaSoftmaxAttention(settings, window, factor, config.attention_dropout)


MIXERS.register(
    Mixer(
        "full_attention",
        lambda config, place: _attention(config, place, None),
        cache_layer=lambda config: KeyValueLayer(None),
    )
)
MIXERS.register(
    Mixer(
        "sliding_attention",
        lambda config, place: _attention(config, place, _window(config)),
        cache_layer=lambda config: KeyValueLayer(_window(config)),
        window=_window,
    )
)

__all__ = ["GLAswaSoftmaxAttention"]
