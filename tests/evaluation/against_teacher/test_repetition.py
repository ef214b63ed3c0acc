"""Repetition of texts, counted by hand."""

from __future__ import annotations

import pytest

from spikingbrain_train.evaluation.against_teacher.repetition import (
    distinct_share,
    longest_loop,
    repetition,
)


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("", 0),
        ("abcdef", 0),
        ("aba", 0),  # nothing is said twice
        ("abab", 2),
        ("ababab", 4),
        ("aaaa", 3),
        ("xyzabcabcab!", 5),
        ("abcd" * 2 + "ef", 4),
    ],
)
def test_longest_loop(text: str, loop: int) -> None:
    assert longest_loop(text) == loop


def test_distinct_ngrams() -> None:
    assert distinct_share("aabb", 1) == 0.5
    assert distinct_share("abab", 2) == pytest.approx(2 / 3)
    assert distinct_share("abc", 4) is None


def test_of_several_texts_are_means() -> None:
    found = repetition(["abcdefgh", "abababab"])
    assert found.distinct[1] == pytest.approx((1 + 0.25) / 2)
    assert found.repeated_4grams == pytest.approx((0 + 3 / 5) / 2)
    assert found.longest_loop == 3.0
    assert found.looping == 0.5
    assert repetition([]).repeated_4grams == 0.0
