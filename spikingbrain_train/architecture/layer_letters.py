"""The layers of a model in a line: ``G S G S F*``, and what its letters mean."""

from __future__ import annotations

from collections.abc import Iterable

from spikingbrain_train.architecture.layers import feed_forwards_of, layers, mixers_of
from spikingbrain_train.architecture.submodule_kind import SubmoduleKind
from spikingbrain_train.config.model import ModelConfig


def layer_letters(model: ModelConfig) -> tuple[list[str], dict[str, str]]:
    """Every layer as the letters of its mixers with the mark of its feed-forward behind them.

    Returns:
        One word a layer: ``G``, ``GS*`` for two branches and experts. And what each letter and mark is: the
        kind's name; dense feed-forwards of the source have no mark.
    """
    mixers, marks = _distinct(mixers_of(model)), _distinct(feed_forwards_of(model))
    words = [
        "".join(mixers[kind] for kind in reversed(layer.mixers)) + marks[layer.feed_forward]
        for layer in layers(model)
    ]
    legend = {sign: kind.name for kind, sign in (*mixers.items(), *marks.items()) if sign}
    return words, legend


def _distinct(kinds: Iterable[SubmoduleKind]) -> dict[SubmoduleKind, str]:
    """What each kind calls itself, or, where another has that already, the next letter of its name."""
    found: dict[SubmoduleKind, str] = {}
    for kind in kinds:
        upper = kind.sign.isupper()
        letters = [letter.upper() if upper else letter.lower() for letter in kind.name if letter.isalnum()]
        free = [sign for sign in (kind.sign, *letters) if sign not in found.values()]
        found[kind] = free[0] if free else f"({kind.name})"
    return found
