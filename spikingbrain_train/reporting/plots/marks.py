"""What lies behind the curves: stages as bands, continuations of runs as thin lines with what has changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spikingbrain_train.reporting.plots.names import changes_in_words
from spikingbrain_train.reporting.plots.recording import Axis
from spikingbrain_train.reporting.plots.rows import Arrangement, Row, Run
from spikingbrain_train.reporting.plots.stage_scale import StageScale, share_before, share_of
from spikingbrain_train.reporting.plots.style import (
    FAINT,
    INK,
    SMALL_SIZE,
    count_text,
    number_text,
    shortened,
)

AXIS_LABELS = {Axis.tokens: "tokens read", Axis.steps: "optimizer steps", Axis.hours: "hours at work"}
_LINES_OF_LABELS, _LONGEST_LABEL = 3, 42


@dataclass(frozen=True)
class Continuation:
    """Where a run went on, for a line in the picture and one in the terminal."""

    run: Run
    place: float
    iteration: int
    changes: list[str]
    """Of settings, in words; empty where nothing has changed."""

    @property
    def label(self) -> str:
        """In few words."""
        whole = ", ".join(self.changes) or "resumed"
        if len(whole) <= _LONGEST_LABEL or len(self.changes) < 2:
            return shortened(whole, _LONGEST_LABEL)
        others = len(self.changes) - 1
        return f"{shortened(self.changes[0], _LONGEST_LABEL - 12)} and {others} more"


def continuations(row: Row) -> list[Continuation]:
    """All of a picture's runs, in the order of their places."""
    found = []
    for run in row.runs:
        for begin in run.recording.beginnings:
            if begin.is_start or (run.until is not None and begin.iteration > run.until):
                continue
            place = run.start + run.recording.place(begin.iteration, run.axis)
            found.append(Continuation(run, place, begin.iteration, changes_in_words(begin.changed)))
    return sorted(found, key=lambda each: each.place)


def set_axis(panel: Any, row: Row, *, is_wide: bool, is_part: bool) -> None:
    """Limits, scale and ticks of the axis that curves share.

    Args:
        panel: matplotlib's Axes.
        row: the runs, or the part of a sequence that is drawn.
        is_wide: whether the panel has the whole width.
        is_part: whether the row is a part.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    text = number_text if row.axis is Axis.hours else count_text
    length = row.end - row.begin
    if (scale := StageScale.of(row)) is not None:
        panel.set_xscale("function", functions=(scale.forward, scale.backward))
        panel.xaxis.set_major_locator(FixedLocator(scale.ticks()))
        panel.set_xlim(row.begin, row.end)
    else:
        panel.xaxis.set_major_locator(MaxNLocator(8 if is_wide else 4, steps=[1, 2, 2.5, 5, 10]))
        # The first point lies at 0, the last at the end: their marks are drawn in full.
        panel.set_xlim(row.begin - 0.008 * length, row.end + 0.012 * length)
    panel.set_xlabel(_axis_label(row, is_part))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    for run in row.runs[1:] if row.arrangement is Arrangement.sequence else []:
        panel.axvline(run.start, color=FAINT, linewidth=0.8, zorder=1)


def name_stages(panel: Any, row: Row) -> None:
    """Write the names of a sequence's stages into the top of a panel."""
    if row.arrangement is not Arrangement.sequence or len(row.runs) < 2:
        return
    for number, run in enumerate(row.runs):
        if number % 2 == 0:
            panel.axvspan(run.start, run.end, color="#000000", alpha=0.035, linewidth=0, zorder=0)
        share = share_of(row, run)
        middle = (run.start + run.end) / 2
        panel.annotate(
            shortened(run.name, max(4, int(95 * share))),
            (middle, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -4),
            textcoords="offset points",
            ha="center",
            va="top",
            color=INK,
            fontweight="bold",
            fontsize=SMALL_SIZE + 0.5,
            zorder=4,
        )


def draw_continuations(panel: Any, row: Row, found: Sequence[Continuation], *, with_labels: bool) -> None:
    """Thin lines where runs went on; labels where they do not run into each other.

    Changes of settings get theirs first; what has no room is told by the terminal.
    """
    for each in found:
        colour = each.run.style.colour if row.is_comparison else FAINT
        panel.axvline(each.place, color=colour, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1.2)
    if not with_labels:
        return
    taken: list[list[tuple[float, float]]] = [[] for _ in range(_LINES_OF_LABELS)]
    written: set[tuple[str, int]] = set()
    below = 1 if row.arrangement is Arrangement.sequence else 0
    for each in sorted(found, key=lambda each: (not each.changes, each.place)):
        text, where = each.label, share_before(row, each.place)
        # The same change of several runs in one place is written once; stops of several runs are not written.
        if (text, round(50 * where)) in written or (row.is_comparison and not each.changes):
            continue
        width = 0.0085 * len(text) + 0.02
        to_the_left = where + width > 1.0
        begin, end = (where - width, where) if to_the_left else (where, where + width)
        for line, others in enumerate(taken):
            if all(end <= left or begin >= right for left, right in others):
                others.append((begin, end))
                written.add((text, round(50 * where)))
                _write_label(panel, each.place, text, line + below, to_the_left)
                break


def _write_label(panel: Any, place: float, text: str, line: int, to_the_left: bool) -> None:
    from matplotlib.patheffects import withStroke

    panel.annotate(
        text,
        (place, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-3 if to_the_left else 3, -4 - 12.5 * line),
        textcoords="offset points",
        ha="right" if to_the_left else "left",
        va="top",
        color=INK,
        fontsize=SMALL_SIZE,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
        zorder=4,
    )


def _axis_label(row: Row, is_part: bool) -> str:
    label = AXIS_LABELS[row.axis]
    if row.arrangement is Arrangement.sequence:
        if len(row.runs) == 1:
            before = "; stages before included" if row.begin else ""
            return f"{label} ({shortened(row.runs[0].name, 28)}{before})"
        label += ", stages before included" if is_part and row.begin else " over all stages"
        if StageScale.of(row) is not None:
            label += ", each stage to its own scale"
    return label
