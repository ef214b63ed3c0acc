"""Numbers are said as people say them."""

from __future__ import annotations

import pytest

from spikingbrain_train.reporting.quantities import hours, quantity, size


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (188_160, "188.2 k"), (7_616_543_488, "7.617 B"), (1e11, "100 B")],
)
def test_counts_are_readable(number: float, text: str) -> None:
    assert quantity(number) == text


@pytest.mark.parametrize(("number", "text"), [(12 << 20, "12.0 MiB"), (1.5 * 2**30, "1.50 GiB")])
def test_sizes_have_a_unit(number: float, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.01, "36 s"),
        (0.25, "15 min"),
        (1.5, "1.5 hours"),
        (47, "47 hours"),
        (557.4, "557 hours (23.2 days)"),
        (16306, "16,306 hours (679.4 days)"),
    ],
)
def test_hours_become_what_a_person_says(number: float, text: str) -> None:
    assert hours(number) == text
