"""How a check says no: one ConfigurationError that names the setting and says what would be valid."""

from __future__ import annotations

import math
from collections.abc import Iterable

from spikingbrain_train.errors import ConfigurationError


def require(condition: bool, sentence: str) -> None:
    """Raise ConfigurationError with ``sentence`` unless ``condition`` holds."""
    if not condition:
        raise ConfigurationError(sentence)


def divisors(number: int) -> list[int]:
    """All positive divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


_LONGEST_CHOICE = 12


def either(values: Iterable[int]) -> str:
    """Numbers as a choice in words: "1, 2 or 4"; of many the first ones and the last."""
    *others, last = map(str, values)
    if len(others) > _LONGEST_CHOICE:
        others = [*others[: _LONGEST_CHOICE - 2], "..."]
    return f"{', '.join(others)} or {last}" if others else last


def multiples_around(number: int, step: int) -> list[int]:
    """The multiples of ``step`` just below and above ``number``, those above 0."""
    return [n for n in (number // step * step, -(-number // step) * step) if n > 0]
