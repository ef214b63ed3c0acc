"""A picture of how long documents are: bars of documents, an outline of the tokens that they have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spikingbrain_train.data.lengths import DatasetDescription, counted
from spikingbrain_train.reporting.plots.picture import save_figure
from spikingbrain_train.reporting.plots.style import FAINT, GRID, INK, SMALL_SIZE, WIDTH, count_text

_BARS, _OUTLINE = "#56b4e9", "#d55e00"
_BINS = 40
_LOG_FROM = 20
"""Times the shortest, from which on the longest document asks for a logarithmic axis."""
_HEIGHT = 2.9


def save_length_picture(
    descriptions: Sequence[DatasetDescription], destination: Path, seq_length: int | None = None
) -> None:
    """Draw the datasets under each other, over one axis.

    Args:
        descriptions: of the datasets.
        destination: the file.
        seq_length: tokens of a sample, marked where it lies between the lengths.

    Raises:
        ConfigurationError: the name has another ending than .png, .svg or .pdf.
        PlatformError: it cannot be written.
    """
    save_figure(lambda: draw_lengths(descriptions, seq_length), destination, "--plot")


def draw_lengths(descriptions: Sequence[DatasetDescription], seq_length: int | None = None) -> Any:
    """The picture as a matplotlib Figure, which asks for no display."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

    figure = Figure(
        figsize=(WIDTH, 0.3 + _HEIGHT * len(descriptions)), layout="constrained", facecolor="white"
    )
    axes = figure.subplots(len(descriptions), 1, sharex=True, squeeze=False)[:, 0]
    shown = [each.lengths[each.lengths > 0] for each in descriptions]
    shortest = min((int(lengths.min()) for lengths in shown if len(lengths)), default=1)
    longest = max((int(lengths.max()) for lengths in shown if len(lengths)), default=1)
    is_log = longest > _LOG_FROM * shortest
    bounds = _bounds(shortest, longest, is_log=is_log)
    for axis, each, lengths in zip(axes, descriptions, shown, strict=True):
        documents, tokens = counted(lengths, bounds)
        if documents.sum():
            axis.bar(
                bounds[:-1],
                documents / documents.sum(),
                np.diff(bounds),
                align="edge",
                color=_BARS,
                edgecolor="white",
                linewidth=0.4,
                label="documents",
            )
            axis.stairs(tokens / tokens.sum(), bounds, color=_OUTLINE, linewidth=1.8, label="tokens in them")
        highest = axis.get_ylim()[1]
        axis.set_ylim(0, 1.28 * highest)
        marks = ((each.summary.median, "solid", "median", 1.2), (each.summary.p99, (0, (4, 2)), "p99", 1.08))
        for value, dashes, name, height in marks:
            axis.axvline(value, ymax=height / 1.28, color=INK, linestyle=dashes, linewidth=1.4)
            is_right = value > (np.sqrt(shortest * longest) if is_log else (shortest + longest) / 2)
            axis.annotate(
                f"{name} {value:,}",
                (value, height * highest),
                xytext=(-4 if is_right else 4, 0),
                textcoords="offset points",
                ha="right" if is_right else "left",
                va="center",
                size=SMALL_SIZE,
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
            )
        if seq_length is not None and bounds[0] < seq_length < bounds[-1]:
            axis.axvspan(seq_length, bounds[-1], color=_OUTLINE, alpha=0.08, linewidth=0, zorder=0)
            share = lengths[lengths >= seq_length].sum() / max(lengths.sum(), 1)
            axis.annotate(
                f"{seq_length:,} and more: {share:.1%} of the tokens",
                (bounds[-1], 0.9 * highest),
                xytext=(-4, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                size=SMALL_SIZE,
                color=INK,
            )
        numbers = each.summary
        axis.set_title(
            f"{each.prefix}: {numbers.documents:,} documents, {count_text(numbers.tokens)} tokens", loc="left"
        )
        axis.set_ylabel("share")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.grid(axis="y", color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axis.spines[side].set_color(FAINT)
    if is_log:
        axes[-1].set_xscale("log", base=2)
        axes[-1].xaxis.set_minor_formatter(NullFormatter())
    axes[-1].set_xlim(bounds[0], bounds[-1] * 1.02)  # a line at the end is seen whole
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes[-1].set_xlabel("tokens of a document" + (" (logarithmic)" if is_log else ""))
    axes[0].legend(loc="upper right", frameon=False, ncols=2, bbox_to_anchor=(1.0, 1.18))
    return figure


def _bounds(shortest: int, longest: int, *, is_log: bool) -> np.ndarray:
    """Bounds of bins, whole numbers that ascend; of equal width on the axis as far as those allow."""
    if longest - shortest < _BINS:
        return np.arange(shortest, longest + 2)
    if not is_log:
        return np.unique(np.linspace(shortest, longest + 1, _BINS + 1).round().astype(np.int64))
    return np.unique(np.geomspace(shortest, longest + 1, _BINS + 1).round().astype(np.int64))
