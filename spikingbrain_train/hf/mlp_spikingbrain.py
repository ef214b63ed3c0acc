"""The feed-forward "mlp" of a `spikingbrain` model: gate, up and down projection.

Part of the modelling code of a checkpoint.
"""

from __future__ import annotations

from .configuration_spikingbrain import SpikingBrainConfig
from .gated_mlp_spikingbrain import SpikingBrainMLP
from .kinds_spikingbrain import FEED_FORWARDS, FeedForward


def _mlp(config: SpikingBrainConfig) -> SpikingBrainMLP:
    return SpikingBrainMLP(config, config.intermediate_size, config.mlp_bias, config.ffn_sub_norm)


FEED_FORWARDS.register(FeedForward("mlp", _mlp))

__all__ = ["SpikingBrainMLP"]
