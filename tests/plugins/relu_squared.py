"""A feed-forward without a gate: ``y = W_down (scale * relu(W_up x)^2)``. Without torch.

Source: Primer (So et al., arXiv 2109.08668). Of a dense source's SwiGLU it takes the up and down projections;
the gate projection has no part in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain_train.architecture.feed_forwards import FEED_FORWARDS, Activations, FeedForwardKind
from spikingbrain_train.architecture.sizes import bytes_per_element
from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.setting import FUNCTION, setting


@dataclass
class ReluSquaredConfig:
    """What is between the projections."""

    scale: float = setting(1.0, above=0, resume=FUNCTION)
    """Factor of the squares; below 1 where a source's projections give large ones."""


class ReluSquaredKind(FeedForwardKind):
    """Of ``model.ffn_hidden_size``; nothing in it is new to a dense source."""

    name = "relu_squared"
    words = "feed-forwards of squared ReLU"
    spec = f"{__package__}.relu_squared_module:spec"
    section = "relu_squared"
    section_type = ReluSquaredConfig
    export_module = f"{__package__}.relu_squared_export"

    def all_settings(self, model: ModelConfig) -> set[str]:
        return super().all_settings(model) | {"ffn_hidden_size"}

    def weights(self, model: ModelConfig) -> tuple[Weight, ...]:
        hidden, width = model.hidden_size, model.ffn_hidden_size
        return (
            Weight(
                "linear_fc1.weight",
                ("mlp_up_weight",),
                ((width, hidden),),
                "feed-forward",
                projection=("mlp_fc1", 0),
            ),
            Weight(
                "linear_fc2.weight",
                ("mlp_down_weight",),
                ((hidden, width),),
                "feed-forward",
                projection=("mlp_fc2", 0),
            ),
        )

    def activations(self, config: RunConfig) -> Activations:
        """What the ReLU gives, what the square gives."""
        element, tensor = bytes_per_element(config.precision), config.parallel.tensor_model_parallel_size
        return Activations(2 * config.model.ffn_hidden_size * element / tensor)

    def describe(self, model: ModelConfig) -> str | None:
        return f"scale {self.own_settings(model).scale:g}"


FEED_FORWARDS.register(ReluSquaredKind())
