"""The feed-forward "no_mlp" of a `spikingbrain` model: there is none, nor a norm in front of one.

Part of the modelling code of a checkpoint.
"""

from __future__ import annotations

from .configuration_spikingbrain import SpikingBrainConfig
from .kinds_spikingbrain import FEED_FORWARDS, FeedForward


def nothing(config: SpikingBrainConfig) -> None:
    """No module: the layer is its mixer alone."""


FEED_FORWARDS.register(FeedForward("no_mlp", nothing))

__all__ = ["nothing"]
