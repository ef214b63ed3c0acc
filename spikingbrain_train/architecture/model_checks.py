"""The network on its own: what its sizes and its mixers have to do with each other."""

from __future__ import annotations

from spikingbrain_train.config.model import FeedForward, ModelConfig
from spikingbrain_train.config.require import require
from spikingbrain_train.config.setting import check_fields


def check_model(model: ModelConfig) -> None:
    """The network on its own, every setting of it included. Raises ConfigurationError."""
    check_fields(model, "model.")
    check_mixers(model)


def check_mixers(model: ModelConfig) -> None:
    """Sizes against the mixers that the layers have. Raises ConfigurationError."""
    if any(mixer.softmax_branch for mixer in model.layer_mixers()):
        require(
            model.kv_channels % 2 == 0,
            f"model.kv_channels={model.kv_channels} is odd, but rotary positions turn pairs of channels; "
            f"use an even number",
        )


def has_experts(model: ModelConfig) -> bool:
    """Whether any layer is a mixture of experts."""
    return FeedForward.moe in model.layer_feed_forwards()
