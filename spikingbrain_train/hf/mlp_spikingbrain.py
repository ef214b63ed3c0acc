"""The feed-forward "mlp" of a `spikingbrain` model: a SwiGLU.

Part of the modelling code of a checkpoint.
"""

from __future__ import annotations

from .configuration_spikingbrain import SpikingBrainConfig
from .kinds_spikingbrain import FEED_FORWARDS, FeedForward
from .mixers_gla_swa import GLAswaMLP
from .spikes_gla_swa import encoders_of


def _mlp(config: SpikingBrainConfig) -> GLAswaMLP:
    sizes = (config.hidden_size, config.intermediate_size, config.hidden_act)
    return GLAswaMLP(*sizes, encoders_of(config.spiking), config.mlp_bias)


FEED_FORWARDS.register(FeedForward("mlp", _mlp))

__all__ = ["GLAswaMLP"]
