"""A picture of an evaluation: multiple choice, probes by length and depth, curves beside a teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spikingbrain_train.reporting.plots.choice_panels import LETTERS_TITLE, draw_orders, draw_scores
from spikingbrain_train.reporting.plots.choice_scores import FourOrders
from spikingbrain_train.reporting.plots.evaluation_report import ProbeTable, Report
from spikingbrain_train.reporting.plots.picture import draw_legend, dress, save_figure
from spikingbrain_train.reporting.plots.style import (
    GRID,
    INK,
    SEQUENTIAL,
    SMALL_SIZE,
    TITLE_SIZE,
    WIDTH,
    line_style,
    shortened,
)

_AGREEMENT = {
    "forced_agreement": "behind the teacher's text",
    "agreement": "each in its own text",
    "still_identical": "no difference so far",
}
_CURVES_HEIGHT, _HEAD, _ROW, _FRAME = 2.5, 0.3, 0.26, 0.95
"""Inches: of a panel of curves; of the line above all panels; of a table's row, and of what surrounds it."""
_TASK = 0.5
"""Inches of a task's row among the scores, of one or two models."""
_DARK = 0.45
"""Of the scale of colours, below which numbers are written in white."""


def draw_reports(reports: Sequence[Report], destination: Path, flag: str = "--output") -> None:
    """Draw reports of evaluations: those of several models beside each other.

    Args:
        reports: at least one, none of them empty.
        destination: .png, .svg or .pdf; an existing file is replaced.
        flag: that named it, for sentences.

    Raises:
        ConfigurationError: another ending.
        PlatformError: it cannot be written.
    """
    save_figure(lambda: _figure(reports), destination, flag)


def _figure(reports: Sequence[Report]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    asked = [report for report in reports if report.tasks]
    orders = _orders(reports)
    tables = _tables(reports)
    pairs = [tables[at : at + 2] for at in range(0, len(tables), 2)]
    compared = [report for report in reports if report.by_position is not None]
    heights = [_scores_height(asked)] if asked else []
    heights += [_FRAME + 0.3 + _ROW * len(orders)] if orders else []
    heights += [max(_FRAME + _ROW * len(table.lengths) for _, table in pair) for pair in pairs]
    heights += [_CURVES_HEIGHT] * (2 if compared else 0)
    height = _HEAD + sum(heights)
    engine = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, wspace=0.03, rect=(0, 0, 1, 1 - _HEAD / height))
    figure = Figure(figsize=(WIDTH, height), layout=engine, facecolor="white")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    if asked:
        words = dict(zip(map(id, reports), _numbered(reports, [""] * len(reports)), strict=True))
        draw_scores(figure.add_subplot(grid[0, :]), [(words[id(each)], each.tasks) for each in asked])
    if orders:
        draw_orders(figure.add_subplot(grid[1, 0]), orders)
        _draw_letters(figure.add_subplot(grid[1, 1]), orders)
    first = len(heights) - len(pairs) - (2 if compared else 0)
    for row, pair in enumerate(pairs, first):
        for column, (title, table) in enumerate(pair):
            _draw_table(figure.add_subplot(grid[row, column]), title, table)
    if compared:
        _draw_agreement(figure.add_subplot(grid[-2, :]), compared)
        _draw_kl(figure.add_subplot(grid[-1, :]), compared)
    names = _numbered(reports, [shortened(report.name, max(14, 80 // len(reports))) for report in reports])
    figure.text(
        0.012, 1 - 0.09 / height, "   ".join(names), ha="left", va="top", color=INK, fontsize=TITLE_SIZE + 1
    )
    return figure


def _scores_height(asked: Sequence[Report]) -> float:
    tasks = {task.name for report in asked for task in report.tasks}
    return _FRAME + 0.2 + _TASK * max(1.0, len(asked) / 2) * len(tasks)


def _orders(reports: Sequence[Report]) -> dict[str, FourOrders]:
    """What was asked in four orders, by the names of its rows; a task of several reports stands together."""
    tasks = list(dict.fromkeys(task.name for report in reports for task in report.tasks))
    found = {}
    for name in tasks:
        rows = _numbered(reports, [name.replace("_", " ")] * len(reports))
        for row, report in zip(rows, reports, strict=True):
            for task in report.tasks:
                if task.name == name and task.orders is not None:
                    found[row] = task.orders
    return found


def _tables(reports: Sequence[Report]) -> list[tuple[str, ProbeTable]]:
    """Titles and tables; the same probe of several reports stands side by side."""
    names = list(dict.fromkeys(table.name for report in reports for table in report.probes))
    found = []
    for name in names:
        titles = _numbered(reports, [name.replace("_", " ")] * len(reports))
        for title, report in zip(titles, reports, strict=True):
            found += [(title, table) for table in report.probes if table.name == name]
    return found


def _numbered(reports: Sequence[Report], texts: Sequence[str]) -> list[str]:
    """One text of each report, with its number where there are several."""
    return list(texts) if len(reports) == 1 else [f"{at}: {text}" for at, text in enumerate(texts, 1)]


def _draw_table(panel: Any, title: str, table: ProbeTable) -> None:
    """Shares as colours from 0 to 1 with their percent in them, the shortest length on top."""
    _draw_shares(panel, table.shares, table.depths, table.lengths)
    for x in range(1, len(table.depths)):
        panel.axvline(x - 0.5, color="white", linewidth=3.0 if x == len(table.depths) - 1 else 0.6)
    panel.set_title(title, loc="left", fontweight="bold", color=INK)
    panel.set_xlabel("depth, and % of answers found" if len(table.depths) > 1 else "% of answers found")
    panel.set_ylabel("tokens")


def _draw_letters(panel: Any, orders: Mapping[str, FourOrders]) -> None:
    letters = list(dict.fromkeys(letter for each in orders.values() for letter in each.letters))
    shares = [[each.letters.get(letter, math.nan) for letter in letters] for each in orders.values()]
    _draw_shares(panel, shares, letters, list(orders))
    panel.set_title(LETTERS_TITLE, loc="left", fontweight="bold", color=INK)
    panel.set_xlabel(f"% of answers; without a liking {100 / len(letters):.0f} each")


def _draw_shares(
    panel: Any, shares: Sequence[Sequence[float]], columns: Sequence[str], rows: Sequence[str]
) -> None:
    """A table of shares from 0 to 1, as colours with their percent in them."""
    from matplotlib.colors import Normalize

    image = panel.imshow(shares, cmap=SEQUENTIAL, norm=Normalize(0.0, 1.0), aspect="auto")
    panel.grid(False)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0, labelcolor=INK)
    panel.set_xticks(range(len(columns)), columns)
    panel.set_yticks(range(len(rows)), rows)
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if math.isfinite(share):
                colour = "white" if image.norm(share) < _DARK else "black"
                panel.text(
                    x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=SMALL_SIZE, color=colour
                )


def _draw_agreement(panel: Any, reports: Sequence[Report]) -> None:
    for kind, (key, words) in enumerate(_AGREEMENT.items()):
        labels = _numbered(reports, [words] * len(reports))
        for number, (report, label) in enumerate(zip(reports, labels, strict=True)):
            style = line_style(kind + number * len(_AGREEMENT))
            _draw_curve(panel, [100 * value for value in _of(report, key)], style, label)
    panel.set_ylim(0, 103)
    _finish(panel, "Same token as the teacher", "% of texts")


def _draw_kl(panel: Any, reports: Sequence[Report]) -> None:
    labels = _numbered(reports, [shortened(report.name, 30) for report in reports])
    for number, (report, label) in enumerate(zip(reports, labels, strict=True)):
        style = line_style(number * len(_AGREEMENT))
        _draw_curve(panel, _of(report, "kl_divergence"), style, label if len(reports) > 1 else None)
    panel.set_ylim(bottom=0)
    _finish(panel, "KL(teacher || student) along the teacher's text", "nats")


def _of(report: Report, key: str) -> Sequence[float]:
    assert report.by_position is not None
    return report.by_position.get(key, [])


def _draw_curve(panel: Any, values: Sequence[float], style: Any, label: str | None) -> None:
    panel.plot(
        range(1, len(values) + 1),
        values,
        **style.keywords(),
        linewidth=1.8,
        marker=style.marker,
        markersize=5,
        markevery=max(1, len(values) // 12),
        markeredgecolor="white",
        markeredgewidth=0.5,
        label=label,
    )


def _finish(panel: Any, title: str, unit: str) -> None:
    dress(panel)
    panel.grid(axis="y", color=GRID, linewidth=0.7)
    panel.set_ylabel(unit)
    panel.set_xlabel("generated token")
    panel.set_title(title, loc="left", fontweight="bold", color=INK)
    draw_legend(panel, title, is_wide=True)
