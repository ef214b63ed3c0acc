"""What a feed-forward is, without torch: the contract of every kind, and the registry of kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spikingbrain_train.architecture.registry import Registry
from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.sections import section_of
from spikingbrain_train.config.setting import leaves


@dataclass(frozen=True)
class Activations:
    """Bytes per token on one rank."""

    kept: float
    """From the forward pass to the backward pass."""
    recomputed: float = 0.0
    """Made again in the backward pass, for one layer at a time."""


class FeedForwardKind(ABC):
    """One kind of feed-forward. Everything that is known of it outside its module is asked here."""

    name: str
    """How ``model.feed_forwards`` calls it."""
    words: str
    """What its layers are called in sentences: ``mixture-of-experts layers``; by default by its name."""
    spec: str
    """``package.module:function`` that makes the ``mlp`` of a layer's spec; imported when it is built."""
    section: str | None = None
    """Where the settings of a kind from outside stand in a model: ``model.<section>``."""
    section_type: type | None = None
    """The dataclass of those settings, every field with a default."""
    is_of_the_source: bool = False
    """Whether a dense source has it in every layer."""
    routes_tokens: bool = False
    """Whether it sends every token to some of several experts."""
    hf_layers: Mapping[str, str] = {}
    """What the Hugging Face formats that can hold it call it, by format."""

    def __reduce__(self) -> tuple[Callable[[str], FeedForwardKind], tuple[str]]:
        return _by_name, (self.name,)  # a kind is one object in every process

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "words" not in vars(cls) and hasattr(cls, "name"):
            cls.words = f"{cls.name} layers"

    def check(self, model: ModelConfig) -> None:
        """Its settings, in a model that has it. Raises ConfigurationError."""

    def check_split(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Its channels and experts against the degrees that split them. Raises ConfigurationError."""

    def check_source(self, model: ModelConfig) -> None:
        """Whether a dense one, of ``model.ffn_hidden_size``, can become it. Raises ConfigurationError."""

    def all_settings(self, model: ModelConfig) -> set[str]:
        """Dotted names of the model's settings that are there for it, and for others that name them, too."""
        return set() if self.section is None else set(leaves(self.own_settings(model), f"{self.section}."))

    def own_settings(self, model: ModelConfig) -> Any:
        """The settings in its section."""
        assert self.section is not None, f"{self.name} has no section"
        return section_of(model, self.section)

    def settings(self, model: ModelConfig) -> set[str]:
        """Those of them that have a part in it, with the values that others have."""
        return self.all_settings(model)

    @abstractmethod
    def weights(self, model: ModelConfig) -> tuple[Weight, ...]:
        """Its parameters, in the order of the forward pass."""

    @abstractmethod
    def activations(self, config: RunConfig) -> Activations:
        """What it keeps for its backward pass on one rank, its normed input left out."""

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

    def num_experts(self, model: ModelConfig) -> int:
        """Experts of a layer that tokens are routed to."""
        return 0

    def describe(self, model: ModelConfig) -> str | None:
        """A few words on its settings for plans and reports: ``16 experts, top-1, + 1 shared``."""
        return None


def _by_name(name: str) -> FeedForwardKind:
    return FEED_FORWARDS[name]


FEED_FORWARDS: Registry[FeedForwardKind] = Registry(
    "feed-forward",
    "model.feed_forwards",
    built_in=("spikingbrain_train.architecture.dense", "spikingbrain_train.architecture.moe"),
)
"""Every kind of feed-forward. A new one of the package is a line here."""


def swiglu_weights(model: ModelConfig, width: int) -> tuple[Weight, Weight]:
    """Gate and up projection (2 f h) and down projection (f h) of a SwiGLU of ``width`` f."""
    hidden = model.hidden_size
    return (
        Weight(
            "linear_fc1.weight",
            ("mlp_gate_weight", "mlp_up_weight"),
            ((width, hidden),) * 2,
            "feed-forward",
        ),
        Weight("linear_fc2.weight", ("mlp_down_weight",), ((hidden, width),), "feed-forward"),
    )
