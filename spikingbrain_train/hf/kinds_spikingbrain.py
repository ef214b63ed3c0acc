"""The kinds of mixers, feed-forwards and linear transforms, by the names that config.json has for them.

Part of the modelling code of a checkpoint; needs torch only. A kind is a file beside this one, which
modeling_spikingbrain.py imports and which registers what makes the kind's modules:

    MIXERS.register(Mixer("retention", Retention, cache_layer=lambda config: RecurrentStateLayer()))
    FEED_FORWARDS.register(FeedForward("fat_relu", FatRelu))
    LINEAR_TRANSFORMS.register(Transform("ternary", TernaryWeights))

Settings of kinds that have no key of their own in config.json are `config.kinds[name]`. A module's tensors
are stored under its own names. Where it has parameters that are neither of a linear, an embedding nor a norm,
its method `initialize(std)` draws them for a model that is not loaded. A buffer that is not stored may be
lost where a model is loaded: compute it when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """Where in a model a mixer is."""

    name: str
    """Its kind, as config.json calls it."""
    layer_idx: int
    """0-based."""
    cache_idx: int
    """Index of what it remembers, in `cache.layers`."""


def _nothing(config: Any) -> None:
    return None


@dataclass(frozen=True)
class Mixer:
    """A kind of sequence mixer."""

    name: str
    make: Callable[[Any, Place], nn.Module]
    """Of a configuration and a place. The module is called with the normed input [B, T, hidden_size], the
    cosines and sines [B or 1, T, head_dim] of rotary positions, a `TokenLayout` and the cache or None, and
    returns what the layer adds to its input. The first `layout.num_in_front` tokens are sinks; padding
    (`layout.valid_new`) must leave no trace, and documents (`layout.starts_BT`) must not see each other."""
    cache_layer: Callable[[Any], Any]
    """Of a configuration: what a mixer remembers of a text; `RecurrentStateLayer`, `KeyValueLayer` or
    `StateLayer`."""
    window: Callable[[Any], int | None] = _nothing
    """Of a configuration: how many of the last tokens its `KeyValueLayer` keeps, if not all."""
    check: Callable[[Any], None] = _nothing
    """Raises ValueError where a configuration asks for what it does not compute."""


@dataclass(frozen=True)
class FeedForward:
    """A kind of feed-forward."""

    name: str
    make: Callable[[Any], nn.Module | None]
    """Of a configuration. The module takes [..., hidden_size] to the same; None is a layer without one."""
    check: Callable[[Any], None] = _nothing
    """As of a mixer."""


@dataclass(frozen=True)
class Transform:
    """A kind of what is done to inputs and weights of linears."""

    name: str
    make: Callable[[Any, nn.Linear], nn.Module]
    """Of a configuration and the linear that it is for: a `LinearTransform`."""
    check: Callable[[Any], None] = _nothing
    """As of a mixer."""
    pack: Callable[[Any], nn.Module] | None = None
    """Of a `TransformedLinear`: what stands in its place where weights are stored as this kind makes them."""


Kind = TypeVar("Kind", Mixer, FeedForward, Transform)


class Kinds(Generic[Kind]):
    """Kinds of one sort.

    Args:
        key: of config.json, for sentences.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._kinds: dict[str, Kind] = {}

    def register(self, kind: Kind) -> None:
        """Add a kind; a file that is read again replaces what it registered before."""
        self._kinds[kind.name] = kind

    def __getitem__(self, name: str) -> Kind:
        """The kind of this name. Raises ValueError where none of the files beside this one has it."""
        if name not in self._kinds:
            raise ValueError(f'{self._key} knows no "{name}"; known are {", ".join(self._kinds)}.')
        return self._kinds[name]


MIXERS: Kinds[Mixer] = Kinds("mixers")
FEED_FORWARDS: Kinds[FeedForward] = Kinds("feed_forwards")
LINEAR_TRANSFORMS: Kinds[Transform] = Kinds("linear_transforms")


def with_defaults(name: str, given: dict | None, defaults: dict[str, Any]) -> dict[str, Any]:
    """Settings under the key `name`. Raises ValueError where `given` has one that is not in `defaults`."""
    unknown = sorted(set(given or {}) - set(defaults))
    if unknown:
        raise ValueError(f"{name} knows no {', '.join(unknown)}; it has {', '.join(defaults)}.")
    return {**defaults, **(given or {})}


def check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises ValueError where the setting `name` is none of `known`."""
    if value not in known:
        raise ValueError(f'{name} knows no "{value}"; known are {", ".join(known)}.')


class StateLayer:
    """What a mixer of several states remembers: tensors by name, each with the batch in front.

    `states` is empty before the first token.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.states: dict[str, Tensor] = {}

    def reset(self) -> None:
        self.states = {}

    def select(self, indices: Tensor) -> None:
        """Keep the rows `indices` of the batch, in that order, with repetitions."""
        self.states = {name: x.index_select(0, indices.to(x.device)) for name, x in self.states.items()}

    def repeat(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        for state in list(self.states.values())[:1]:
            self.select(torch.arange(len(state), device=state.device).repeat_interleave(repeats))

    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.states.values())


__all__ = ["FEED_FORWARDS", "LINEAR_TRANSFORMS", "MIXERS", "FeedForward", "Mixer", "Place", "Transform"]
