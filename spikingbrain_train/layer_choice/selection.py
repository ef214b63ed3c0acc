"""Which layers are swapped: how many, those that must stay, evenly spaced ones, the cheapest. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from spikingbrain_train.architecture.layers import source_names
from spikingbrain_train.architecture.mixers import MIXERS
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.model import AND_SO_ON
from spikingbrain_train.errors import ConfigurationError

Entry = Any
"""A layer's mixer as ``mixers`` lists it: a name, or a list of names for branches."""


@dataclass(frozen=True)
class Pair:
    """What a layer may become."""

    swapped: Entry
    """The mixer of swapped layers."""
    kept: Entry
    """That of the others: it takes the source's weights as they are."""

    def mixers(self, num_layers: int, swapped: Sequence[int]) -> list[Entry]:
        """The list of a model whose layers ``swapped`` are swapped."""
        return [self.swapped if layer in swapped else self.kept for layer in range(num_layers)]


def pair_of(recipe: ConversionConfig, to: str | None, kept: str | None) -> Pair:
    """The two mixers: as the flags say, else the first of either sort in the recipe.

    Args:
        recipe: the conversion.
        to: of --to, YAML: a name, or a list of names.
        kept: of --kept.

    Raises:
        ConfigurationError: a mixer is not known or does not fit its part.
    """
    of_recipe = [entry for entry in recipe.mixers if entry != AND_SO_ON]
    swapped = _entry("--to", to) or next((e for e in of_recipe if not keeps_weights(e)), None)
    stays = _entry("--kept", kept) or next((e for e in of_recipe if keeps_weights(e)), None)
    if swapped is None:
        raise ConfigurationError("the recipe swaps no layer; name the mixer of swapped ones with --to")
    if stays is None:
        raise ConfigurationError(
            "the recipe keeps no layer with the source's attention; name the mixer of those that stay with "
            "--kept"
        )
    if keeps_weights(swapped):
        raise ConfigurationError(
            f"--to {_shown(swapped)} computes with the source's weights as they are, so there is nothing to "
            "choose; name another mixer"
        )
    if not keeps_weights(stays):
        raise ConfigurationError(
            f"--kept {_shown(stays)} does not take the source's weights as they are; name one that does"
        )
    return Pair(swapped, stays)


def keeps_weights(entry: Entry) -> bool:
    """Whether a mixer takes the weights of the dense source's. Raises ConfigurationError for unknown ones."""
    kinds = [MIXERS[name] for name in (entry if isinstance(entry, list) else [entry])]
    return len(kinds) == 1 and kinds[0].family == MIXERS[source_names()[0]].family


def _entry(flag: str, text: str | None) -> Entry | None:
    if text is None:
        return None
    try:
        entry = yaml.safe_load(text)
    except yaml.YAMLError:
        entry = None
    names = entry if isinstance(entry, list) else [entry]
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigurationError(f"{flag} {text} is no mixer; write a name, or [name,name] for two branches")
    return entry


def _shown(entry: Entry) -> str:
    return f"[{','.join(entry)}]" if isinstance(entry, list) else str(entry)


def number_of_swaps(text: str, num_layers: int, num_candidates: int) -> int:
    """How many layers --swap asks for: a number of them, or a share of all layers between 0 and 1.

    Raises:
        ConfigurationError: it is neither, or more than may be swapped.
    """
    try:
        number = round(float(text) * num_layers) if "." in text else int(text)
    except (ValueError, OverflowError):
        number = -1
    if number < 1 or ("." in text and float(text) >= 1):
        raise ConfigurationError(
            f"--swap {text} is no number of layers; give one from 1 to {num_candidates} (15), or a share of "
            "all layers between 0 and 1 (0.5)"
        )
    if number > num_candidates:
        raise ConfigurationError(
            f"--swap {text} is {number} layers, but {num_candidates} of {num_layers} may be swapped; lower "
            "it, or name fewer with --keep"
        )
    return number


def candidates(keep: str, num_layers: int) -> list[int]:
    """0-based layers that may be swapped: all but those of --keep (``0,29``).

    Raises:
        ConfigurationError: there is no such layer, or none is left.
    """
    kept = set()
    for word in filter(None, keep.split(",")):
        if not word.strip().isdecimal() or int(word) >= num_layers:
            raise ConfigurationError(
                f"--keep {keep} names the layer {word.strip()}; the model has 0 to {num_layers - 1}, written "
                "as 0,12,29"
            )
        kept.add(int(word))
    if len(kept) == num_layers:
        raise ConfigurationError(f"--keep {keep} leaves no layer to swap; name fewer")
    return [layer for layer in range(num_layers) if layer not in kept]


def evenly_spaced(among: Sequence[int], number: int) -> list[int]:
    """``number`` of the candidates at equal distances, the first among them: the control of a choice."""
    return [among[at * len(among) // number] for at in range(number)]


def cheapest(costs: Mapping[int, float], number: int) -> list[int]:
    """The layers of least cost, in order; of equal ones the earlier."""
    return sorted(sorted(costs, key=lambda layer: (costs[layer], layer))[:number])
