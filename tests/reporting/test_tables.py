"""Reports fit the columns they are given, and long lists of layers become ranges."""

from __future__ import annotations

import pytest

from spikingbrain_train.reporting.tables import facts, packed, spans, table, terminal_width


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([3], "3"),
        ([0, 1], "0-1"),
        ([0, 2], "0, 2"),
        (range(28), "0-27"),
        (range(0, 28, 2), "0-26 even"),
        (range(1, 28, 2), "1-27 odd"),
        ([6, 13, 20, 27], "6-27 every 7th"),
        ([0, 3, 6], "0-6 every 3rd"),
        ([0, 1, 2, 4, 8, 10], "0-2, 4, 8, 10"),
        ([3, 5, 7, 9, 11, 12, 14, 15, 16], "3-11 odd, 12, 14-16"),
        ([0, 22, 44], "0-44 every 22nd"),
        ([0, 11, 22, 33], "0-33 every 11th"),
    ],
)
def test_layers_that_are_alike_become_ranges(numbers, text):
    assert spans(numbers) == text


@pytest.mark.parametrize("seed", range(20))
def test_ranges_say_exactly_the_numbers(seed):
    import random

    numbers = sorted(random.Random(seed).sample(range(40), 15))
    said = []
    for part in spans(numbers).split(", "):
        span, _, words = part.partition(" ")
        first, _, last = span.partition("-")
        step = {"": 1, "even": 2, "odd": 2}.get(words) or int("".join(filter(str.isdigit, words)))
        said += range(int(first), int(last or first) + 1, step)
    assert said == numbers


def test_facts_wrap_under_their_own_column():
    lines = facts([("model", "word " * 30), ("", "goes on")], 80)
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].startswith("model       word") and lines[1].startswith(" " * 12 + "word")
    assert lines[-1] == " " * 12 + "goes on"


def test_a_table_is_as_wide_as_its_cells():
    rows = [["layers", "total"], ["0-27", "1.25"], ["a longer name", "12.50"]]
    assert table(rows, left=1) == [
        "layers         total",
        "--------------------",
        "0-27            1.25",
        "a longer name  12.50",
    ]


def test_parts_are_packed_into_lines():
    assert packed(["a=1", "bb=22", "ccc=333"], " ", 9) == ["a=1 bb=22", "ccc=333"]
    assert packed(["a-very-long-part"], " ", 3) == ["a-very-long-part"]


@pytest.mark.parametrize(("columns", "width"), [("40", 80), ("100", 100), ("300", 120)])
def test_a_report_takes_80_to_120_columns(columns, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert terminal_width() == width
