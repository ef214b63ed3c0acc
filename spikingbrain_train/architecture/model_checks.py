"""The network on its own: what its sizes and its mixers have to do with each other."""

from __future__ import annotations

from spikingbrain_train.architecture.feed_forwards import FEED_FORWARDS
from spikingbrain_train.architecture.layers import feed_forwards_of, mixers_of, projections_of
from spikingbrain_train.architecture.linear_transforms import LINEAR_TRANSFORMS, check_alternatives
from spikingbrain_train.architecture.mixers import MIXERS
from spikingbrain_train.config.model import AND_SO_ON, LayersConfig, ModelConfig
from spikingbrain_train.config.setting import check_fields
from spikingbrain_train.config.stage import StageConfig


def check_model(model: ModelConfig) -> None:
    """The network on its own, every setting of it included. Raises ConfigurationError."""
    check_fields(model, "model.")
    check_mixers(model)


def check_kinds(config: LayersConfig) -> None:
    """Every mixer and feed-forward that a model or a conversion names is known. Raises ConfigurationError."""
    for entry in config.mixers:
        for name in entry if isinstance(entry, list) else [entry]:
            if name != AND_SO_ON:
                MIXERS[name]
    for name in config.feed_forwards:
        if name != AND_SO_ON:
            FEED_FORWARDS[name]


def check_mixers(model: ModelConfig) -> None:
    """Kinds that are known, and sizes against those that the layers have. Raises ConfigurationError."""
    check_kinds(model)
    for mixer in mixers_of(model):
        mixer.check(model)
    for feed_forward in feed_forwards_of(model):
        feed_forward.check(model)


def check_linear_transforms(model: ModelConfig, stage: StageConfig) -> None:
    """What is done to linears, against the network and the stage. Raises ConfigurationError."""
    present = projections_of(model)
    for kind in LINEAR_TRANSFORMS:
        kind.check(model, stage, present)
    check_alternatives(model)
