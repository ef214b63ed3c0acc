"""How much a text repeats itself. Pure Python."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

NGRAMS = (1, 2, 3, 4)
LONGEST_PERIOD = 32
"""Tokens of a loop's body up to which it is looked for."""


@dataclass(frozen=True)
class Repetition:
    """Of several texts; means over them."""

    distinct: dict[int, float]
    """n -> share of n-grams that are different from all others of their text (1 where none repeats)."""
    longest_loop: float
    """Tokens that only go on with a loop, of the longest one in each text."""
    looping: float
    """Share of texts that go on with a loop for a quarter of their tokens or more."""

    @property
    def repeated_4grams(self) -> float:
        """Share of 4-grams that stood in their text before."""
        return 1.0 - self.distinct[4]


def repetition(texts: Sequence[Sequence[Hashable]]) -> Repetition:
    """Of texts as token ids; those too short for an n-gram do not count for it."""
    distinct = {}
    for n in NGRAMS:
        shares = [share for text in texts if (share := distinct_share(text, n)) is not None]
        distinct[n] = _mean(shares, default=1.0)
    loops = [longest_loop(text) for text in texts]
    looping = [4 * loop >= len(text) > 0 for loop, text in zip(loops, texts, strict=True)]
    return Repetition(distinct, _mean(loops, default=0.0), _mean(looping, default=0.0))


def distinct_share(text: Sequence[Hashable], n: int) -> float | None:
    """Different n-grams over all of them, None where there are none."""
    ngrams = [tuple(text[at : at + n]) for at in range(len(text) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def longest_loop(text: Sequence[Hashable]) -> int:
    """Tokens in a row that are what stood one period before, at the period where most are.

    At least as many as the period: else nothing has been said twice. ``a b a b a b`` has 4, ``a b a`` none.
    """
    longest = 0
    for period in range(1, min(LONGEST_PERIOD, len(text) // 2) + 1):
        run = 0
        for at in range(period, len(text)):
            run = run + 1 if text[at] == text[at - period] else 0
            if run >= period:
                longest = max(longest, run)
    return longest


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default
