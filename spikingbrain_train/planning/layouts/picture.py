"""Pictures of a search: what a step of each layout is made of, or how a model scales over GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spikingbrain_train.planning.layouts.search import Search
from spikingbrain_train.planning.memory import GIB
from spikingbrain_train.reporting.plots.picture import dress, save_figure
from spikingbrain_train.reporting.plots.style import FAINT, GRID, INK, SMALL_SIZE, WIDTH, line_style

_PARTS = (
    ("arithmetic", "#0072b2", ""),
    ("recomputation", "#56b4e9", "//"),
    ("communication", "#d55e00", ".."),
    ("bubble", "#d9d9d9", ""),
)


def save_search_picture(searches: Sequence[Search], destination: Path) -> None:
    """Draw one search as bars of its layouts, several as curves over GPUs.

    Raises:
        ConfigurationError: the name has another ending than .png, .svg or .pdf.
        PlatformError: it cannot be written.
    """
    if len(searches) == 1:
        save_figure(lambda: draw_layouts(searches[0]), destination, "--plot")
    else:
        save_figure(lambda: draw_scaling(searches), destination, "--plot")


def draw_layouts(search: Search) -> Any:
    """A bar a layout: seconds of a step by what they go to. A matplotlib Figure."""
    from matplotlib.figure import Figure

    number = len(search.found)
    figure = Figure(figsize=(WIDTH, 1.3 + 0.5 * number), layout="constrained", facecolor="white")
    axis = figure.subplots()
    names = [
        f"{found.layout.describe(search.world_size)}\n{found.layout.recompute.name}, "
        f"{found.plan.fullest.memory.total / GIB:.0f} GiB"
        for found in search.found
    ]
    left = [0.0] * number
    for part, colour, hatch in _PARTS:
        seconds = [getattr(found.time, part) for found in search.found]
        axis.barh(
            range(number),
            seconds,
            left=left,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=part,
            height=0.7,
        )
        left = [before + more for before, more in zip(left, seconds, strict=True)]
    for row, (end, found) in enumerate(zip(left, search.found, strict=True)):
        axis.annotate(
            f"MFU {found.time.mfu:.1%}",
            (end, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL_SIZE,
            color=INK,
        )
    axis.set_yticks(range(number), names, fontsize=SMALL_SIZE)
    axis.invert_yaxis()
    axis.set_xlim(0, max(left) * 1.18)
    axis.set_xlabel(f"predicted seconds of a step on {search.world_size} GPUs")
    _clean(axis)
    figure.legend(loc="outside lower center", ncols=len(_PARTS), frameon=False, fontsize=SMALL_SIZE)
    return figure


def draw_scaling(searches: Sequence[Search]) -> Any:
    """Tokens a second beside what they would be without loss, and MFU, over GPUs. A matplotlib Figure.

    Args:
        searches: of one model on more and more GPUs.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, PercentFormatter

    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained", facecolor="white")
    speed, share = figure.subplots(1, 2)
    gpus = [each.world_size for each in searches]
    tokens = [each.found[0].tokens_per_second_per_gpu * each.world_size for each in searches]
    mfu = [each.found[0].time.mfu for each in searches]
    style = line_style(0)
    speed.plot(gpus, tokens, marker=style.marker, **style.keywords())
    ideal = [tokens[0] * each / gpus[0] for each in gpus]
    speed.plot(gpus, ideal, color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)))
    share.plot(gpus, mfu, marker=style.marker, **style.keywords())
    for axis in (speed, share):
        axis.set_xscale("log", base=2)
        marks = sorted(set(gpus))
        axis.set_xticks(marks, [f"{mark:,}" for mark in marks], rotation=45, ha="right")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("GPUs")
        _clean(axis)
    speed.set_yscale("log")
    speed.set_title("predicted tokens a second (dotted: no loss)", loc="left", color=INK)
    share.set_title("predicted MFU", loc="left", color=INK)
    share.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    share.set_ylim(0, 1.1 * max(mfu))
    return figure


def _clean(axis: Any) -> None:
    dress(axis)
    axis.grid(axis="x", color=GRID, linewidth=0.7)
