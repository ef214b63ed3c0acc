"""Lines over tokens, steps or hours: noisy ones with their running mean, gaps where there is no number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

from spikingbrain_train.reporting.plots.recording import Series
from spikingbrain_train.reporting.plots.style import INK, SMALL_SIZE, LineStyle, number_text

FEWEST_TO_SMOOTH = 60
"""Points from which on a noisy series gets a running mean."""


_STEEP_SHARE = 0.05
"""Of a run's length: a fall within it is its beginning."""


class Marks(Enum):
    """Which points of a line are marked; all of them where they are few."""

    all = "all"
    """As many as have room."""
    some = "some"
    """Those that tell the line from others."""
    none = "none"


def window_of(points: int, wanted: int | None) -> int:
    """Points that a running mean is taken over; 1 is none.

    Args:
        points: of the series.
        wanted: what the user asked for; None takes a thirtieth of a long series.
    """
    if wanted is not None:
        return max(1, min(wanted, points))
    return 1 if points < FEWEST_TO_SMOOTH else max(5, points // 30)


def running_mean(series: Series, window: int) -> Series:
    """The mean of ``window`` points around each, fewer at the ends; NaN where a point is."""
    before, after = (window - 1) // 2, window // 2
    sums, counts = [0.0], [0]
    for _, y in series:
        is_number = math.isfinite(y)
        sums.append(sums[-1] + (y if is_number else 0.0))
        counts.append(counts[-1] + is_number)
    found = []
    for index, (x, y) in enumerate(series):
        low, high = max(index - before, 0), min(index + after + 1, len(series))
        number = counts[high] - counts[low]
        found.append((x, (sums[high] - sums[low]) / number if math.isfinite(y) and number else math.nan))
    return found


def draw_noisy(
    panel: Any,
    series: Series,
    style: LineStyle,
    label: str | None,
    window: int,
    *,
    faint: float = 0.4,
    is_one_of_many: bool = False,
    share: float = 1.0,
) -> None:
    """Draw a series that jumps: light as it is, and its running mean in full, where that is taken.

    Args:
        panel: matplotlib's Axes.
        series: what to draw.
        style: colour, dashes and marker.
        label: for the legend.
        window: points of the running mean, 1 for none.
        faint: opacity of the series as it is.
        is_one_of_many: give it markers that tell it from others.
        share: of the axis, that the series takes.
    """
    if window > 1:
        panel.plot(*_columns(series), color=style.colour, alpha=faint, linewidth=0.8, zorder=1.5)
        series = running_mean(series, window)
    marks = Marks.some if is_one_of_many else Marks.none
    draw_line(panel, series, style, label, marks=marks, share=share)


def draw_line(
    panel: Any,
    series: Series,
    style: LineStyle,
    label: str | None,
    *,
    width: float = 1.8,
    marks: Marks = Marks.all,
    share: float = 1.0,
) -> None:
    """Draw a series; a number between two gaps is a dot, so that it can be seen.

    Args:
        panel: matplotlib's Axes.
        series: what to draw.
        style: colour, dashes and marker.
        label: for the legend.
        width: of the line, in points.
        marks: which points are marked.
        share: of the axis, that the series takes.
    """
    room = max(2, int(share / 0.022)) if marks is Marks.all else max(2, int(8 * share))
    every = max(1, -(-len(series) // room))
    is_marked = every == 1 or marks is not Marks.none
    panel.plot(
        *_columns(series),
        **style.keywords(),
        linewidth=width,
        marker=style.marker if is_marked else None,
        markersize=4.5 if every == 1 or marks is Marks.all else 6,
        markevery=every if marks is Marks.all else (every // 2, every),
        markeredgecolor="white",
        markeredgewidth=0.5,
        label=label,
        zorder=2.5,
    )
    if every > 1 and (lonely := _lonely(series)):
        panel.plot(
            *_columns(lonely), color=style.colour, linestyle="none", marker=".", markersize=5, zorder=2.4
        )


def write_value(panel: Any, x: float, y: float, *, is_first: bool) -> None:
    """Write a value beside its point, readable on any line: of falling curves, where there is none of it."""
    from matplotlib.patheffects import withStroke

    panel.annotate(
        number_text(float(f"{y:.3g}")),
        (x, y),
        xytext=(7, 0) if is_first else (-3, 6),
        textcoords="offset points",
        ha="left" if is_first else "right",
        va="bottom",
        color=INK,
        fontsize=SMALL_SIZE,
        fontweight="bold",
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
        zorder=5,
    )


def cut_above(panel: Any, drawn: Sequence[Series], also: Sequence[float] = ()) -> None:
    """End a linear axis where all runs have left their first steep fall, if that would hide what follows.

    What is cut is said in the panel.

    Args:
        panel: matplotlib's Axes.
        drawn: all series of the panel.
        also: values that are to be seen, too.
    """
    finite = [[point for point in series if math.isfinite(point[1])] for series in drawn]
    later = [
        y
        for series in finite
        for x, y in series
        if x >= series[0][0] + _STEEP_SHARE * (series[-1][0] - series[0][0])
    ]
    if len(later) < FEWEST_TO_SMOOTH:
        return
    low, high = min(*later, *also), max(*later, *also)
    highest = max(y for series in finite for _, y in series)
    room = high - low
    if room <= 0 or highest - low < 4 * room:
        return
    panel.set_ylim(low - 0.08 * room, high + 0.35 * room)
    panel.annotate(
        f"begins above the axis, at {number_text(float(f'{highest:.3g}'))}",
        (0.0, 1.0),
        xycoords="axes fraction",
        xytext=(14, -5),
        textcoords="offset points",
        va="top",
        color=INK,
        fontsize=SMALL_SIZE,
    )


def _columns(series: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    points = list(series)
    return [x for x, _ in points], [y for _, y in points]


def _lonely(series: Series) -> Series:
    """Numbers without a neighbour that is one: a line through them has no length."""
    finite = [math.isfinite(y) for _, y in series]
    padded = [False, *finite, False]
    return [
        point
        for index, point in enumerate(series)
        if finite[index] and not padded[index] and not padded[index + 2]
    ]
