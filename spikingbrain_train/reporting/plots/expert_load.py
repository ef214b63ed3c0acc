"""The panel of experts: how evenly tokens are spread over them, and how many are dropped."""

from __future__ import annotations

import math
from typing import Any

from spikingbrain_train.reporting.plots.curves import Marks, draw_line, draw_noisy, window_of
from spikingbrain_train.reporting.plots.recording import Series
from spikingbrain_train.reporting.plots.rows import Row, Run
from spikingbrain_train.reporting.plots.style import FAINT, line_style
from spikingbrain_train.reporting.plots.views import Options, View, lines_view, table_view


def expert_views(row: Row, options: Options) -> list[View | None]:
    if not any(name.startswith("moe/") for run in row.runs for name in run.recording.metrics):
        return []
    # Where no expert is ever full or idle, there is nothing to see of it.
    names = [name for name in ("moe/dropped_tokens", "moe/idle_experts") if _is_ever_positive(row, name)]
    halves = [lines_view(row, name, options, is_wide=False) for name in (*names, "moe/aux_loss")]
    if row.is_comparison:
        return [_busiest_comparison(row, options), *halves]
    return [_load_band(row), table_view(row, "moe/expert_load"), *halves]


def _is_ever_positive(row: Row, metric: str) -> bool:
    return any(y > 0 for run in row.runs for _, y in run.series(metric))


def _load_range(run: Run) -> tuple[Series, Series, Series]:
    """Over all layers and experts of a report: the least load, the mean of layers' largest, the largest."""
    least: Series = []
    middle: Series = []
    most: Series = []
    layers = list(run.recording.layers("moe/load_max_over_mean").values())
    for point in run.recording.points:
        tops = [value for name in layers if isinstance(value := point.get(name), (int, float))]
        if not tops or (run.until is not None and point["iteration"] > run.until):
            continue
        x = run.start + run.recording.position(point, run.axis)
        table = point.get("moe/expert_load") or []
        cells = [cell for line in table for cell in line if isinstance(cell, (int, float))]
        least.append((x, min(cells) if cells else math.nan))
        middle.append((x, math.fsum(tops) / len(tops)))
        most.append((x, max(tops)))
    return least, middle, most


def _load_band(row: Row) -> View | None:
    ranges = [found for run in row.runs if (found := _load_range(run))[2]]
    if not ranges:
        return None

    def draw(panel: Any) -> None:
        for number, (least, middle, most) in enumerate(ranges):
            places = [x for x, _ in most]
            low, high = [y for _, y in least], [y for _, y in most]
            panel.fill_between(places, low, high, color=line_style(0).colour, alpha=0.15, linewidth=0)
            words = ("busiest expert", "mean of the layers' busiest", "least busy expert")
            for index, series in enumerate((most, middle, least)):
                if any(math.isfinite(y) for _, y in series):
                    label = words[index] if number == 0 else None
                    draw_line(panel, series, line_style(index), label, width=1.4, marks=Marks.some)
        panel.axhline(1.0, color=FAINT, linewidth=1.0, zorder=1)
        panel.set_ylim(bottom=0.0)

    return View("Expert load", "load over mean, 1 is even", draw, height=2.4)


def _busiest_comparison(row: Row, options: Options) -> View | None:
    having = [(run, found[2]) for run in row.runs if (found := _load_range(run))[2]]
    if not having:
        return None

    def draw(panel: Any) -> None:
        for run, most in having:
            window = window_of(len(most), options.smooth)
            draw_noisy(panel, most, run.style, None, window, faint=0.25, is_one_of_many=True)

    return View("Busiest expert of all layers (1 is an even spread)", "tokens over mean", draw)
