"""Panels of multiple choice: scores with standard errors beside guessing, and four orders of options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spikingbrain_train.reporting.plots.choice_scores import FourOrders, Measured, TaskScore
from spikingbrain_train.reporting.plots.picture import draw_legend, dress
from spikingbrain_train.reporting.plots.style import FAINT, GRID, INK, SMALL_SIZE, line_style

SCORES_TITLE = "Multiple choice: right answers, with their standard errors"
ORDERS_TITLE = "Each question in four orders of its options"
LETTERS_TITLE = "Letters answered"
_SPREAD = 0.62
"""Of a task's row, over which its scores are spread."""
_BELOW = 38
"""Points: the numbers and the name of an axis."""
_PARTS = ("right in all", "right in some", "right in none")
_LOOKS: tuple[dict[str, Any], ...] = (
    {"color": line_style(0).colour},
    {"color": line_style(6).colour, "hatch": "///"},
    {"color": GRID},
)


def draw_scores(panel: Any, scores: Sequence[tuple[str, Sequence[TaskScore]]]) -> None:
    """A row for each task: a filled mark for each model's accuracy, a hollow one for its acc_norm.

    Args:
        panel: matplotlib's Axes.
        scores: of each report, behind the words that tell it from the others.
    """
    tasks = list(dict.fromkeys(task.name for _, found in scores for task in found))
    has_norm = any(task.acc_norm is not None for _, found in scores for task in found)
    marks = len(scores) * (2 if has_norm else 1)
    shown = {row: index for index, row in enumerate(tasks)}
    for number, (words, found) in enumerate(scores):
        for kind, (name, hollow) in enumerate((("accuracy", False), ("acc_norm", True))):
            place = number * (2 if has_norm else 1) + kind
            offset = _SPREAD * ((place + 0.5) / marks - 0.5)
            points = [(shown[task.name] + offset, getattr(task, name)) for task in found]
            known = [(y, value) for y, value in points if value is not None]
            label = name if len(scores) == 1 else f"{words}{name}"
            _draw_marks(panel, known, number, label, hollow=hollow)
    _draw_chance(panel, scores, shown)
    dress(panel)
    panel.grid(False)
    panel.grid(axis="x", color=GRID, linewidth=0.7)
    panel.set_xlim(0, 100)
    panel.set_ylim(len(tasks) - 0.5, -0.5)
    panel.set_yticks(range(len(tasks)), [_row_name(name, scores) for name in tasks])
    panel.set_xlabel("% of questions")
    panel.set_title(SCORES_TITLE, loc="left", fontweight="bold", color=INK)
    draw_legend(panel, SCORES_TITLE, is_wide=True)


def draw_orders(panel: Any, rows: Mapping[str, FourOrders]) -> None:
    """A bar for each task: right in all orders, which is knowledge, in some, which is a letter, in none.

    Args:
        panel: matplotlib's Axes.
        rows: by their names, from the top.
    """
    from matplotlib.transforms import offset_copy

    dress(panel)
    panel.grid(False)
    starts = [0.0] * len(rows)
    for part, (words, look) in enumerate(zip(_PARTS, _LOOKS, strict=True)):
        shares = [100 * _shares(each)[part] for each in rows.values()]
        panel.barh(
            range(len(rows)), shares, left=starts, height=0.62, label=words, edgecolor="white",
            linewidth=0.8, **look,
        )  # fmt: skip
        for row, (start, share) in enumerate(zip(starts, shares, strict=True)):
            if share >= 8:
                _write_share(panel, start + share / 2, row, share, is_dark=part == 0)
        starts = [start + share for start, share in zip(starts, shares, strict=True)]
    panel.set_xlim(0, 100)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_yticks(range(len(rows)), list(rows))
    panel.set_xlabel("% of questions")
    panel.set_title(ORDERS_TITLE, loc="left", fontweight="bold", color=INK)
    below_the_axis = offset_copy(panel.transAxes, panel.figure, y=-_BELOW, units="points")
    panel.legend(
        loc="upper left", bbox_to_anchor=(0.0, 0.0), bbox_transform=below_the_axis, ncols=3, frameon=False,
        fontsize=SMALL_SIZE, handlelength=1.4, columnspacing=1.0, borderaxespad=0.0,
    )  # fmt: skip


def _shares(orders: FourOrders) -> tuple[float, float, float]:
    return (
        orders.right_under_all,
        orders.right_under_some,
        max(0.0, 1 - orders.right_under_all - orders.right_under_some),
    )


def _write_share(panel: Any, x: float, row: int, share: float, *, is_dark: bool) -> None:
    box = None if is_dark else {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    colour = "white" if is_dark else "black"
    panel.text(x, row, f"{share:.0f}", ha="center", va="center", fontsize=SMALL_SIZE, bbox=box, color=colour)


def _row_name(name: str, scores: Sequence[tuple[str, Sequence[TaskScore]]]) -> str:
    counts = {task.questions for _, found in scores for task in found if task.name == name}
    numbers = " and ".join(f"{count:,}" for count in sorted(counts))
    return f"{name.replace('_', ' ')}\n({numbers})"


def _draw_marks(
    panel: Any, points: Sequence[tuple[float, Measured]], number: int, label: str, *, hollow: bool
) -> None:
    if not points:
        return
    style = line_style(number)
    panel.errorbar(
        [100 * value.share for _, value in points],
        [y for y, _ in points],
        xerr=[100 * (value.error or 0.0) for _, value in points],
        fmt=style.marker,
        color=style.colour,
        markerfacecolor="white" if hollow else style.colour,
        markersize=6,
        elinewidth=1.4,
        capsize=3,
        label=label,
        zorder=3,
    )


def _draw_chance(
    panel: Any, scores: Sequence[tuple[str, Sequence[TaskScore]]], shown: Mapping[str, int]
) -> None:
    chances = {(shown[task.name], task.chance) for _, found in scores for task in found}
    for number, (row, chance) in enumerate(sorted(chances)):
        panel.plot(
            [100 * chance] * 2, [row - 0.42, row + 0.42], color=FAINT, linewidth=1.4, linestyle=(0, (3, 1.5)),
            label="guessing" if number == 0 else None, zorder=2,
        )  # fmt: skip
