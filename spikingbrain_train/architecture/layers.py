"""The layers of a model as kinds: what planning, conversion and the models' specs iterate over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, TypeVar

from spikingbrain_train.architecture.branches import branch_weights, in_order
from spikingbrain_train.architecture.feed_forwards import FEED_FORWARDS, FeedForwardKind
from spikingbrain_train.architecture.initializers import EmbeddingRows
from spikingbrain_train.architecture.linear_transforms import stored_beside, without_transforms
from spikingbrain_train.architecture.mixers import MIXERS, MixerKind
from spikingbrain_train.architecture.weights import Split, Weight
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.model import ModelConfig

_Listed = TypeVar("_Listed")
_of_models: ContextVar[dict[Hashable, tuple[ModelConfig, Any]] | None] = ContextVar("of_models", default=None)


@contextmanager
def unchanged_models() -> Iterator[None]:
    """Until the end of the block no model is changed in place: its layers and their weights are listed once.

    A search of layouts asks for the same lists tens of thousands of times, which would be most of its time.
    """
    if _of_models.get() is not None:
        yield  # inside another one
        return
    token = _of_models.set({})
    try:
        yield
    finally:
        _of_models.reset(token)


def _listed_once(make: Callable[..., _Listed]) -> Callable[..., _Listed]:
    """``make``, whose last argument is a model, for each model once within :func:`unchanged_models`."""

    @wraps(make)
    def of_model(*arguments: Any) -> _Listed:
        known = _of_models.get()
        if known is None:
            return make(*arguments)
        *others, model = arguments
        key = (make, *others, id(model))
        if key not in known:
            known[key] = model, make(*arguments)  # who holds the model keeps its id from another one
        listed: _Listed = known[key][1]
        return listed

    return of_model


@dataclass(frozen=True)
class Layer:
    """One decoder layer: norm, mixer, residual, and, if there is one, norm, feed-forward, residual."""

    mixers: tuple[MixerKind, ...]
    """The mixer, or the branches that read the same input, in the order of their weights."""
    feed_forward: FeedForwardKind

    @property
    def mixer_name(self) -> str:
        """As configs write it: ``gla``, or ``[gla,swa]`` for branches."""
        names = [kind.name for kind in reversed(self.mixers)]
        return names[0] if len(names) == 1 else f"[{','.join(names)}]"

    @property
    def has_the_sources_mixer(self) -> bool:
        """Whether a dense source mixes the same way."""
        return len(self.mixers) == 1 and self.mixers[0].is_of_the_source

    @property
    def families(self) -> tuple[str, ...]:
        """What decides the mixers' parameters."""
        return tuple(kind.family for kind in self.mixers)

    @_listed_once
    def mixer_weights(self, model: ModelConfig) -> tuple[Weight, ...]:
        """Parameters of the mixer or its branches, below ``self_attention.``."""
        return tuple(weight.below("self_attention.") for weight in branch_weights(model, self.mixers))

    @_listed_once
    def feed_forward_weights(self, model: ModelConfig) -> tuple[Weight, ...]:
        """Parameters of the feed-forward, below ``mlp.``."""
        return tuple(weight.below("mlp.") for weight in self.feed_forward.weights(model))

    @_listed_once
    def weights(self, model: ModelConfig) -> tuple[Weight, ...]:
        """All parameters of the layer, in the order of the forward pass."""
        found = (
            _norm("input_layernorm.weight", "input_norm", model),
            *self.mixer_weights(model),
            *self._feed_forward_behind_its_norm(model),
        )
        return tuple(each for weight in found for each in (weight, *stored_beside(model, weight)))

    def _feed_forward_behind_its_norm(self, model: ModelConfig) -> tuple[Weight, ...]:
        if not self.feed_forward.is_there:
            return ()
        norm = _norm("pre_mlp_layernorm.weight", "mlp_norm", model)
        return (norm, *self.feed_forward_weights(model))


def _norm(name: str, role: str, model: ModelConfig) -> Weight:
    return Weight(name, (role,), ((model.hidden_size,),), "norms", Split.none)


def layers(model: ModelConfig) -> list[Layer]:
    """Every layer of the decoder, in order.

    Raises:
        ConfigurationError: a kind is not known.
    """
    return list(_layers(model))


@_listed_once
def _layers(model: ModelConfig) -> tuple[Layer, ...]:
    known: dict[tuple[Sequence[str], str], Layer] = {}
    found = []
    for branches, feed_forward in zip(model.layer_mixers(), model.layer_feed_forwards(), strict=True):
        key = (branches, feed_forward)
        if key not in known:
            kinds = in_order([MIXERS[name] for name in branches])
            known[key] = Layer(kinds, FEED_FORWARDS[feed_forward])
        found.append(known[key])
    return tuple(found)


def alike(among: Iterable[Layer]) -> Iterator[tuple[Layer, int]]:
    """The different ones among some layers, in the order of their first, and how many there are of each.

    Layers that are alike hold and cost the same, which need not be worked out again for each of a hundred.
    """
    yield from Counter(among).items()


def mixers_of(model: ModelConfig) -> list[MixerKind]:
    """Every kind of mixer that a layer of ``model`` has, each once, in the order of their first layer."""
    return list(dict.fromkeys(kind for layer in layers(model) for kind in layer.mixers))


def rotary_limit(model: ModelConfig) -> int | None:
    """Tokens that rotary positions are declared for; None where no mixer turns anything by them."""
    is_turned = any("rotary_base" in kind.settings(model) for kind in mixers_of(model))
    return model.max_position_embeddings if is_turned else None


def feed_forwards_of(model: ModelConfig) -> list[FeedForwardKind]:
    """Every kind of feed-forward that a layer of ``model`` has, each once."""
    return list(dict.fromkeys(layer.feed_forward for layer in layers(model)))


def projections_of(model: ModelConfig) -> set[str]:
    """The projections that the layers have; every mixer has an output, every feed-forward its two."""
    found = {name for kind in mixers_of(model) for name in kind.input_projections(model)}
    found.add(Projection.attention_output)
    if any(kind.is_there for kind in feed_forwards_of(model)):
        found |= {Projection.mlp_fc1, Projection.mlp_fc2}
    return found


def has_experts(model: ModelConfig) -> bool:
    """Whether any layer sends its tokens to some of several experts."""
    return any(kind.routes_tokens for kind in feed_forwards_of(model))


def embedding_weights(model: ModelConfig) -> tuple[Weight, ...]:
    """Parameters in front of the first layer: token embedding and sinks."""
    embedding = Weight(
        "embedding.word_embeddings.weight",
        ("embedding",),
        ((model.vocab_size, model.hidden_size),),
        "embedding",
        pads_vocabulary=True,
    )
    sinks = Weight(
        "sink_embedding.weight",
        ("sinks",),
        ((model.num_sink_tokens, model.hidden_size),),
        "sink tokens",
        Split.none,
        init=EmbeddingRows(),
    )
    return (embedding, *([sinks] if model.num_sink_tokens else ()))


def output_weights(model: ModelConfig) -> tuple[Weight, ...]:
    """Parameters behind the last layer: final norm and output layer."""
    output = Weight(
        "output_layer.weight",
        ("output",),
        ((model.vocab_size, model.hidden_size),),
        "output layer",
        pads_vocabulary=True,
    )
    norm = _norm("decoder.final_layernorm.weight", "final_norm", model)
    return (norm, *(() if model.share_embeddings_and_output_weights else (output,)))


def model_weights(model: ModelConfig) -> Iterator[tuple[int | None, Weight]]:
    """Every parameter with its layer (0-based, None around the layers), in the order of the forward pass.

    Names are whole: ``decoder.layers.0.mlp.linear_fc1.weight``.
    """
    yield from ((None, weight) for weight in embedding_weights(model))
    for number, layer in enumerate(layers(model)):
        yield from ((number, w.below(f"decoder.layers.{number}.")) for w in layer.weights(model))
    yield from ((None, weight) for weight in output_weights(model))


def source_names() -> tuple[str, str]:
    """What configs call the mixer and the feed-forward of a dense source."""
    mixer = next(kind.name for kind in MIXERS if kind.is_of_the_source)
    feed_forward = next(kind.name for kind in FEED_FORWARDS if kind.is_of_the_source)
    return mixer, feed_forward


def dense_source(model: ModelConfig) -> ModelConfig:
    """The dense source that teaches it: its mixer and feed-forward everywhere, plain linears, no sinks."""
    mixer, feed_forward = source_names()
    source = replace(model, mixers=[mixer], feed_forwards=[feed_forward], num_sink_tokens=0)
    return without_transforms(source)


def attends_everywhere(model: ModelConfig) -> bool:
    """Whether every layer has one mixer that takes a dense source's weights as they are: softmax attention.

    Dense sources do, over everything or within windows.
    """
    family = MIXERS[source_names()[0]].family
    return all(layer.families == (family,) for layer in layers(model))


def swapped_layers(among: Iterable[Layer]) -> list[Layer]:
    """Those whose mixer is not the dense source's; the alignment stage trains their mixers."""
    return [layer for layer in among if not layer.has_the_sources_mixer]
