"""Tables of numbers as colours: layers over tokens, layers over experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from spikingbrain_train.reporting.plots.recording import Series
from spikingbrain_train.reporting.plots.style import FAINT, INK, SEQUENTIAL, SMALL_SIZE, number_text

_MOST_COLUMNS = 240
_WIDEST_SCALE = 1e3
"""The largest value over the smallest that a logarithmic scale of colours tells from those below it."""
_MOST_WRITTEN = 12
"""Columns up to which the numbers are written into their cells."""


def draw_over_axis(
    panel: Any, rows: Sequence[Series], names: Sequence[str], end: float, height: float
) -> None:
    """One row of colours per series, lowest first, over the axis that curves have.

    Args:
        panel: matplotlib's Axes.
        rows: each with the same places.
        names: of the rows.
        end: where the axis ends; a single point gets a column of some width.
        height: of the panel, in inches.
    """
    places, table = _binned(rows)
    edges = _edges(places, end)
    image, is_cut = _mesh(panel, edges, table)
    _name_rows(panel, names)
    _colour_bar(panel, image, height, is_cut)


def draw_table(
    panel: Any, rows: Sequence[Sequence[float]], names: Sequence[str], height: float, highest: float
) -> None:
    """A table with one row of colours each, lowest first; small ones with their numbers.

    Args:
        panel: matplotlib's Axes.
        rows: of the table.
        names: of the rows.
        height: of the panel, in inches.
        highest: where the scale of the colours, which begins at 0, ends at least.
    """
    columns = max(len(row) for row in rows)
    table = [[*row, *[math.nan] * (columns - len(row))] for row in rows]
    image, is_cut = _mesh(panel, [number - 0.5 for number in range(columns + 1)], table, highest)
    _name_rows(panel, names)
    step = max(1, math.ceil(columns / 16))
    panel.set_xticks(range(0, columns, step))
    if columns <= _MOST_WRITTEN and len(rows) <= _MOST_WRITTEN:
        for y, row in enumerate(table):
            for x, value in enumerate(row):
                if math.isfinite(value):
                    dark = image.norm(value) < 0.45
                    panel.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=SMALL_SIZE,
                               color="white" if dark else "black")  # fmt: skip
    _colour_bar(panel, image, height, is_cut)


def _mesh(
    panel: Any, edges: Sequence[float], table: Sequence[Sequence[float]], highest: float | None = None
) -> tuple[Any, bool]:
    """The colours, and whether there are values below their scale."""
    from matplotlib.colors import LogNorm, Normalize

    low, high = _limits(table)
    if highest is not None:
        norm: Any = Normalize(min(low, 0.0), max(high, highest))
    elif low >= 0 and high > 10 * low:
        # On a linear scale all layers but the worst would look the same; what has no error ends the scale.
        norm = LogNorm(max(low, high / _WIDEST_SCALE), high)
        table = [[max(value, norm.vmin) for value in row] for row in table]
    else:
        norm = Normalize(low, high)
    heights = [number - 0.5 for number in range(len(table) + 1)]
    image = panel.pcolormesh(edges, heights, table, cmap=SEQUENTIAL, norm=norm, rasterized=True)
    return image, low < norm.vmin


def _limits(table: Sequence[Sequence[float]]) -> tuple[float, float]:
    values = [value for row in table for value in row if math.isfinite(value)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    return low, high if high > low else low + (abs(low) or 1.0)


def _name_rows(panel: Any, names: Sequence[str]) -> None:
    step = max(1, math.ceil(len(names) / 10))
    shown = range(0, len(names), step)
    panel.set_yticks(list(shown), [names[number] for number in shown])
    panel.grid(False)


def _colour_bar(panel: Any, image: Any, height: float, is_cut: bool) -> None:
    """A thin bar above the panel, which stays as wide as those above and below it."""
    bar = panel.inset_axes((0.70, 1 + 0.09 / height, 0.22, 0.13 / height))
    panel.figure.colorbar(image, cax=bar, orientation="horizontal")
    bar.xaxis.set_ticks([])
    bar.xaxis.set_ticks([], minor=True)
    bar.spines[:].set_color(FAINT)
    bar.set_title("")
    low, high = (number_text(float(f"{end:.2g}")) for end in (image.norm.vmin, image.norm.vmax))
    for place, text, side in ((0.0, f"≤ {low}" if is_cut else low, "right"), (1.0, high, "left")):
        bar.annotate(
            text,
            (place, 0.5),
            (-4 if side == "right" else 4, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=SMALL_SIZE,
            color=INK,
        )


def _binned(rows: Sequence[Series]) -> tuple[list[float], list[list[float]]]:
    """The places and rows of at most so many columns as can be seen, means of those that fall together."""
    places = [x for x, _ in rows[0]]
    size = max(1, math.ceil(len(places) / _MOST_COLUMNS))
    groups = [range(begin, min(begin + size, len(places))) for begin in range(0, len(places), size)]
    table = [[_mean([row[index][1] for index in group]) for group in groups] for row in rows]
    return [_mean([places[index] for index in group]) for group in groups], table


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _edges(places: Sequence[float], end: float) -> list[float]:
    """Half-way between neighbours; the first and the last column are as wide as those allow."""
    if len(places) == 1:
        half = 0.02 * (end or 1.0)
        return [places[0] - half, places[0] + half]
    between = [(left + right) / 2 for left, right in zip(places, places[1:], strict=False)]
    first, last = 2 * places[0] - between[0], 2 * places[-1] - between[-1]
    return [max(first, 0.0) if places[0] >= 0 else first, *between, min(last, max(end, places[-1]))]
