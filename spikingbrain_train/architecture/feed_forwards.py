"""What a feed-forward is, without torch: the contract of every kind, and the registry of kinds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from spikingbrain_train.architecture.registry import Registry
from spikingbrain_train.architecture.submodule_kind import SubmoduleKind
from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.model import ActivationFunc, ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.config.run import RunConfig


@dataclass(frozen=True)
class Activations:
    """Bytes per token on one rank."""

    kept: float
    """From the forward pass to the backward pass."""
    recomputed: float = 0.0
    """Made again in the backward pass, for one layer at a time."""


class FeedForwardKind(SubmoduleKind):
    """One kind of feed-forward: the ``mlp`` of a layer."""

    is_there: bool = True
    """Whether the layer has one; without, it is its mixer alone and has no norm in front of one either."""
    routes_tokens: bool = False
    """Whether it sends every token to some of several experts."""

    @classmethod
    def sign_of(cls, name: str) -> str:
        """Behind the letters of the mixers: none for the source's, ``*`` for experts, else a small letter."""
        return "*" if cls.routes_tokens else "" if cls.is_of_the_source else name[0].lower()

    def __reduce__(self) -> tuple[Callable[[str], FeedForwardKind], tuple[str]]:
        return _by_name, (self.name,)  # a kind is one object in every process

    def check_source(self, model: ModelConfig) -> None:
        """Whether a dense one, of ``model.ffn_hidden_size``, can become it. Raises ConfigurationError."""

    @abstractmethod
    def weights(self, model: ModelConfig) -> tuple[Weight, ...]:
        """Its parameters, in the order of the forward pass."""

    @abstractmethod
    def activations(self, config: RunConfig) -> Activations:
        """What it keeps for its backward pass on one rank, its normed input left out."""

    def working(self, config: RunConfig) -> float:
        """Bytes per token on one rank that its backward pass holds at its widest point beside what it kept.

        0 where a kind does not say.
        """
        return 0.0

    def computes_again(self, config: RunConfig, weight: Weight) -> bool:
        """Whether what the linear of a weight keeps is made anew in the backward pass.

        Whole layers that are computed again (``parallel.recompute=full``) are not its matter.
        """
        return config.parallel.recompute in (Recompute.moe_feed_forward, Recompute.moe_layer)

    def most_kept_by_experts(self, config: RunConfig) -> float | None:
        """Bytes of a micro-batch on one rank that routed experts keep at most, however tokens are routed.

        Beside what they read, which every token brings along. None where nothing bounds it.
        """
        return None

    def copies_of_experts(self, config: RunConfig) -> tuple[int, float] | None:
        """Busy experts of a layer that may stand on every rank at once, and bytes of a copy.

        None where none are copied.
        """
        return None

    def dispatched_bytes(self, config: RunConfig) -> float:
        """Bytes per token that are sent to experts, and come back; 0 where no token is routed."""
        return 0.0

    def megatron_settings(
        self, model: ModelConfig, parallel: ParallelConfig, layers: Sequence[bool]
    ) -> dict[str, Any]:
        """Fields of megatron-core's TransformerConfig that it needs.

        Args:
            model: the network.
            parallel: degrees that split it.
            layers: of every layer of the decoder, whether it has this kind.
        """
        return {}

    def without_dropping(self, model: ModelConfig) -> ModelConfig:
        """The network with every token sent to all experts that it chose, however many chose the same.

        What an expert has room for depends on the tokens beside a token; a text that is read token by token
        would read otherwise than at once.
        """
        return model

    def num_experts(self, model: ModelConfig) -> int:
        """Experts of a layer that tokens are routed to."""
        return 0

    def trained_experts(self, model: ModelConfig) -> tuple[int, ...]:
        """Experts of its layers, by number, beside which nothing in the model trains; none where all does."""
        return ()

    def drops_tokens(self, model: ModelConfig) -> bool:
        """Whether an expert takes no more than a number of tokens, and leaves the rest out."""
        return False


def _by_name(name: str) -> FeedForwardKind:
    return FEED_FORWARDS[name]


FEED_FORWARDS: Registry[FeedForwardKind] = Registry(
    "feed-forward",
    "model.feed_forwards",
    built_in=(
        "spikingbrain_train.architecture.dense",
        "spikingbrain_train.architecture.moe",
        "spikingbrain_train.architecture.no_mlp",
    ),
)
"""Every kind of feed-forward. A new one of the package is a line here."""


ACTIVATION_SETTINGS = frozenset({"activation_func", "fatrelu_threshold"})
"""Settings of a model that are there for kinds whose gate goes through ``model.activation_func``."""


def activation_settings(model: ModelConfig) -> set[str]:
    """Those of them that have a part in it, with the activation that it has."""
    has_threshold = model.activation_func is ActivationFunc.fatrelu
    return set(ACTIVATION_SETTINGS) if has_threshold else {"activation_func"}


def describe_activation(model: ModelConfig) -> str | None:
    """The activation of a model's gates in words, None where it is that of a SwiGLU."""
    if model.activation_func is ActivationFunc.silu:
        return None
    threshold = f" {model.fatrelu_threshold:g}" if model.activation_func is ActivationFunc.fatrelu else ""
    return f"{model.activation_func.value}{threshold}"


def gated_weights(model: ModelConfig, width: int) -> tuple[Weight, Weight]:
    """Gate and up projection (2 f h) and down projection (f h) of a gated feed-forward of ``width`` f."""
    hidden = model.hidden_size
    return (
        Weight(
            "linear_fc1.weight",
            ("mlp_gate_weight", "mlp_up_weight"),
            ((width, hidden),) * 2,
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
