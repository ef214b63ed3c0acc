"""What training text is blended of: entries of ``data.train``, each a prefix or a prefix with its weight."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from spikingbrain_train.config.require import require

_PARTS = ({"prefix"}, {"prefix", "weight"})


def check_blend(setting: str, entries: Sequence[Any]) -> None:
    """Every entry has a form, every weight a meaning, and no dataset stands there twice.

    Raises:
        ConfigurationError: names the entry and says what would be valid.
    """
    weighted = []
    for number, entry in enumerate(entries):
        place = f"{setting}[{number}]"
        given: Any = {"prefix": entry} if isinstance(entry, str) else entry
        require(
            isinstance(given, dict)
            and set(given) in _PARTS
            and isinstance(given["prefix"], str)
            and bool(given["prefix"].strip()),
            f"{place}={entry} does not fit: {place} takes a prefix, or {{prefix: data/a, weight: 0.7}}",
        )
        weight = given.get("weight")
        if weight is None:
            continue
        weighted.append(number)
        require(
            isinstance(weight, (int, float)) and not isinstance(weight, bool),
            f"{place} has the weight {weight}, which is no number; give a positive one",
        )
        require(
            weight > 0 and math.isfinite(weight),
            f"{place} has the weight {weight}, which must be a positive, finite number; leave a dataset out "
            f"of {setting} instead of weighting it 0",
        )
    prefixes = prefixes_of(entries)
    if weighted and len(weighted) < len(entries):
        without = next(number for number in range(len(entries)) if number not in weighted)
        require(
            False,
            f"{setting} gives {prefixes[weighted[0]]} a weight and {prefixes[without]} none; give every "
            "dataset one, or none to blend by size",
        )
    require(
        math.isfinite(sum(weights_of(entries) or [])),
        f"{setting}: the sum of the weights is not finite; their scale does not matter, give smaller ones",
    )
    places: dict[str, int] = {}
    for number, prefix in enumerate(prefixes):
        first = places.setdefault(os.path.realpath(prefix), number)
        require(
            first == number,
            f"{setting}[{number}]={prefix} is the dataset of {setting}[{first}]; name it once, with the sum "
            "of the weights",
        )


def prefixes_of(entries: Sequence[Any]) -> list[str]:
    """The prefix of every entry."""
    return [entry if isinstance(entry, str) else entry["prefix"] for entry in entries]


def weights_of(entries: Sequence[Any]) -> list[float] | None:
    """The weight of every entry, None where they have none."""
    weights = [None if isinstance(entry, str) else entry.get("weight") for entry in entries]
    given = [float(weight) for weight in weights if weight is not None]
    return given if given and len(given) == len(weights) else None


def blend(prefixes: Sequence[str], weights: Sequence[float] | None = None) -> list[Any]:
    """Entries of these prefixes, with a weight each unless they are None."""
    if weights is None:
        return list(prefixes)
    return [{"prefix": prefix, "weight": weight} for prefix, weight in zip(prefixes, weights, strict=True)]
