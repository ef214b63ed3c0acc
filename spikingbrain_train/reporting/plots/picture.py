"""A picture of runs: its panels under each other, and the file that it is written to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spikingbrain_train.errors import PlatformError
from spikingbrain_train.reporting.plots.cross_entropies import final_values
from spikingbrain_train.reporting.plots.formats import format_of
from spikingbrain_train.reporting.plots.marks import (
    Continuation,
    continuations,
    draw_continuations,
    name_stages,
    set_axis,
)
from spikingbrain_train.reporting.plots.rows import Arrangement, Row
from spikingbrain_train.reporting.plots.style import (
    DPI,
    FAINT,
    GRID,
    INK,
    SMALL_SIZE,
    TEXT_SIZE,
    TITLE_SIZE,
    WIDTH,
    count_text,
    number_text,
    shortened,
)
from spikingbrain_train.reporting.plots.views import Options, View
from spikingbrain_train.storage.durable_files import replaced_durably

_CHARACTER, _TITLE_CHARACTER, _SAMPLE = 0.066, 0.085, 0.5
"""Inches of a legend's or a title's character, about, and of a line's sample with the space around it."""
_WITHOUT_DATE: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
_RC: Any = {
    "font.size": TEXT_SIZE,
    "axes.titlesize": TITLE_SIZE,
    "axes.labelsize": TEXT_SIZE,
    "xtick.labelsize": SMALL_SIZE,
    "ytick.labelsize": SMALL_SIZE,
    "legend.fontsize": SMALL_SIZE,
    "svg.hashsalt": "spikingbrain",
    "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class _Band:
    """Views that stand side by side."""

    views: list[View]

    @property
    def height(self) -> float:
        return max(view.height for view in self.views) + 0.65  # the title above, the axis below


def save_picture(row: Row, views: Sequence[View], options: Options, destination: Path) -> None:
    """Draw and write a picture; it appears whole or not at all.

    Raises:
        ConfigurationError: the name has another ending than .png, .svg or .pdf.
        PlatformError: it cannot be written.
    """
    save_figure(lambda: draw_picture(row, views, options), destination)


def save_figure(draw: Callable[[], Any], destination: Path, flag: str = "--output") -> None:
    """Write what ``draw`` makes, a matplotlib Figure, in the style of all pictures.

    Raises:
        ConfigurationError, PlatformError: as :func:`save_picture`.
    """
    kind = format_of(destination, flag)
    import matplotlib

    with matplotlib.rc_context(_RC):
        figure = draw()
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            with replaced_durably(destination) as temporary:
                # No date: the same metrics give the same file.
                figure.savefig(temporary, format=kind, dpi=DPI, metadata=_WITHOUT_DATE.get(kind))
        except OSError as error:
            raise PlatformError(
                f"{destination} cannot be written ({error.strerror}); choose another file."
            ) from error


def draw_picture(row: Row, views: Sequence[View], options: Options) -> Any:
    """The picture as a matplotlib Figure, which asks for no display."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    bands = _bands(views)
    legend_rows = _legend_rows(row)
    head = 0.1 + 0.19 * legend_rows if legend_rows else 0.28
    height = head + sum(band.height for band in bands)
    engine = ConstrainedLayoutEngine(
        w_pad=0.08, h_pad=0.06, hspace=0.0, wspace=0.03, rect=(0, 0, 1, 1 - head / height)
    )
    figure = Figure(figsize=(WIDTH, height), layout=engine, facecolor="white")
    grid = figure.add_gridspec(len(bands), 2, height_ratios=[band.height for band in bands])
    marks = continuations(row)
    first = True
    for number, band in enumerate(bands):
        for column, view in enumerate(band.views):
            panel = figure.add_subplot(grid[number, :] if view.is_wide else grid[number, column])
            _draw_view(panel, row, view, options, marks, is_first=first)
            first = False
    _write_head(figure, row, height)
    return figure


def _bands(views: Sequence[View]) -> list[_Band]:
    """Wide views alone, narrow ones in pairs as they follow each other; a narrow one left alone is wide."""
    bands: list[_Band] = []
    for view in views:
        last = bands[-1] if bands else None
        if last is not None and not view.is_wide and len(last.views) == 1 and not last.views[0].is_wide:
            last.views.append(view)
        else:
            bands.append(_Band([view]))
    return [_Band([replace(band.views[0], is_wide=True)]) if len(band.views) == 1 else band for band in bands]


def _draw_view(
    panel: Any, row: Row, view: View, options: Options, marks: Sequence[Continuation], *, is_first: bool
) -> None:
    dress(panel)
    view.draw(panel)
    if options.is_log and not view.is_table:
        _make_logarithmic(panel)
    panel.set_title(view.title, loc="left", y=1.0, pad=6, fontweight="bold", color=INK)
    panel.set_ylabel(view.unit)
    if view.x_label is not None:
        panel.set_xlabel(view.x_label)
    else:
        part = view.part or row
        is_part = len(part.runs) < len(row.runs)
        set_axis(panel, part, is_wide=view.is_wide, is_part=is_part)
        here = [each for each in marks if each.run in part.runs]
        if is_first or (is_part and not view.is_table):
            _make_room(panel, part, here if is_first else ())
            name_stages(panel, part)
        if is_first or not row.is_comparison:  # lines of several runs would fill the panels of others
            draw_continuations(panel, part, here, with_labels=is_first)
    if not view.is_table:
        _format_values(panel)
        draw_legend(panel, view.title, is_wide=view.is_wide)


def _make_room(panel: Any, row: Row, marks: Sequence[Continuation]) -> None:
    """Lift the upper end of an axis, so that names and labels stand above the curves."""
    lines = int(len(row.runs) > 1 and not row.is_comparison) + min(2, len(marks))
    low, high = panel.get_ylim()
    if not lines:
        return
    share = 0.085 * lines
    if panel.get_yscale() == "log":
        panel.set_ylim(low, high * (high / low) ** share)
    else:
        panel.set_ylim(low, high + share * (high - low))


def dress(panel: Any) -> None:
    """The grid, spines and colours of every panel of curves.

    Args:
        panel: matplotlib's Axes.
    """
    panel.grid(axis="y", color=GRID, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(FAINT)
    panel.tick_params(colors=FAINT, labelcolor=INK)
    panel.xaxis.label.set_color(INK)
    panel.yaxis.label.set_color(INK)


def _make_logarithmic(panel: Any) -> None:
    """A logarithmic axis, unless a value is not positive (a rate of 0 before the warmup, a share of 0)."""
    values = [float(y) for line in panel.get_lines() for y in line.get_ydata() if math.isfinite(float(y))]
    if values and min(values) > 0:
        panel.set_yscale("log")


def _format_values(panel: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = panel.get_ylim()
    if panel.get_yscale() == "log" and high >= 4 * low:
        subs = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
        panel.yaxis.set_major_locator(LogLocator(subs=subs))
    else:
        panel.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    panel.yaxis.set_minor_locator(NullLocator())
    is_large = max(abs(low), abs(high)) >= 1e4
    text = count_text if is_large else _value_text
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def _value_text(value: float) -> str:
    return number_text(float(f"{value:.4g}"))


def draw_legend(panel: Any, title: str, *, is_wide: bool) -> None:
    """Beside or below the title, where no curve can be; in a narrow panel, without room there, inside.

    Args:
        panel: matplotlib's Axes, with its title.
        title: that it has.
        is_wide: as wide as the picture.
    """
    handles, labels = panel.get_legend_handles_labels()
    if not handles:
        return
    place: dict[str, Any] = {"loc": "upper right", "borderaxespad": 0.3}
    if is_wide:
        place = {
            "loc": "lower right",
            "bbox_to_anchor": (1.0, 1.0),
            "ncols": len(labels),
            "borderaxespad": 0.1,
        }
        widest = max(map(len, labels)) * _CHARACTER + _SAMPLE
        if sum(len(label) * _CHARACTER + _SAMPLE for label in labels) > 7.1 - len(title) * _TITLE_CHARACTER:
            place["ncols"] = max(1, int(7.1 / widest))
            lines = -(-len(labels) // place["ncols"])
            panel.set_title(title, loc="left", y=1.0, pad=8 + 13.5 * lines, fontweight="bold", color=INK)
    panel.legend(
        handles, labels, frameon=False, handlelength=2.6, columnspacing=1.2, handletextpad=0.5, **place
    )


def _legend_rows(row: Row) -> int:
    return len(row.runs) if row.is_comparison else 0


def _write_head(figure: Any, row: Row, height: float) -> None:
    """The name of one run, or the names and styles of those that are compared, with their last values."""
    from matplotlib.lines import Line2D

    if not row.is_comparison:
        names = " → ".join(shortened(run.name, max(12, 66 // len(row.runs))) for run in row.runs)
        stage = row.runs[0].recording.stage
        told = (
            f"{names} ({stage} stage)"
            if row.arrangement is Arrangement.one and stage and stage not in names
            else names
        )
        figure.text(0.012, 1 - 0.09 / height, told, ha="left", va="top", color=INK, fontsize=TITLE_SIZE + 1)
        return
    handles, labels = [], []
    for run in row.runs:
        style = run.style
        handles.append(
            Line2D(
                [],
                [],
                **style.keywords(),
                marker=style.marker,
                markersize=5,
                linewidth=1.8,
                markeredgecolor="white",
                markeredgewidth=0.5,
            )  # fmt: skip
        )
        last = ", ".join(f"{words} {value:.3f}" for words, value in final_values(run).items())
        labels.append(f"{shortened(run.name, 58)}:  {last}" if last else shortened(run.name, 80))
    figure.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(0.005, 1 - 0.04 / height), frameon=False, ncols=1,
        fontsize=TEXT_SIZE, handlelength=4.0, labelspacing=0.3, borderaxespad=0.0,
    )  # fmt: skip
