"""The network on its own: what its sizes and its mixers have to do with each other."""

from __future__ import annotations

from spikingbrain_train.architecture.layers import feed_forwards_of, mixers_of
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.setting import check_fields


def check_model(model: ModelConfig) -> None:
    """The network on its own, every setting of it included. Raises ConfigurationError."""
    check_fields(model, "model.")
    check_mixers(model)


def check_mixers(model: ModelConfig) -> None:
    """Sizes against the kinds that the layers have. Raises ConfigurationError."""
    for mixer in mixers_of(model):
        mixer.check(model)
    for feed_forward in feed_forwards_of(model):
        feed_forward.check(model)
