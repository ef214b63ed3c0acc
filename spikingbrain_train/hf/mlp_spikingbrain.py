"""The feed-forward "mlp" of a `spikingbrain` model: gate, up and down projection.

Part of the modelling code of a checkpoint.
"""

from __future__ import annotations

from .activation_spikingbrain import activation_of
from .configuration_spikingbrain import SpikingBrainConfig
from .kinds_spikingbrain import FEED_FORWARDS, FeedForward
from .mixers_gla_swa import GLAswaMLP
from .spikes_gla_swa import encoders_of


def _mlp(config: SpikingBrainConfig) -> GLAswaMLP:
    sizes = (config.hidden_size, config.intermediate_size, activation_of(config))
    return GLAswaMLP(*sizes, encoders_of(config.spiking), config.mlp_bias)


FEED_FORWARDS.register(FeedForward("mlp", _mlp))

__all__ = ["GLAswaMLP"]
