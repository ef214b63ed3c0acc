"""Layers without a feed-forward: norm, mixer, residual. Mamba's are (arXiv 2312.00752, section 3.4)."""

from __future__ import annotations

from spikingbrain_train.architecture.feed_forwards import FEED_FORWARDS, Activations, FeedForwardKind
from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import ConfigurationError


class NoMLPKind(FeedForwardKind):
    """Nothing in the place of a feed-forward."""

    name = "no_mlp"
    words = "layers without a feed-forward"
    sign = "-"
    spec = ""  # nothing is built
    is_there = False
    export_module = "spikingbrain_train.hf.no_mlp_spikingbrain"
    hf_layers = {"selective_scan": name}

    def check_source(self, model: ModelConfig) -> None:
        raise ConfigurationError(
            f"feed_forwards has {self.name}, which would leave out what the source's feed-forwards know; "
            f"keep dense ones, or make experts of them"
        )

    def weights(self, model: ModelConfig) -> tuple[Weight, ...]:
        return ()

    def activations(self, config: RunConfig) -> Activations:
        return Activations(0.0)


NO_MLP = FEED_FORWARDS.register(NoMLPKind())
