"""A picture of abilities: what pruning the neurons of one does to all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.reporting.plots.picture import dress, save_figure
from spikingbrain_train.reporting.plots.style import INK, SEQUENTIAL, SMALL_SIZE, WIDTH


@dataclass(frozen=True)
class AbilityPicture:
    """Two square tables over abilities."""

    names: Sequence[str]
    damage: Sequence[Sequence[float]]
    """Row: whose neurons are left out; column: whose text is read; nats per token above the whole model."""
    overlap: Sequence[Sequence[float]]
    """Jaccard index of the neurons of two abilities."""


def draw_abilities(picture: AbilityPicture, destination: Path, flag: str = "--output") -> None:
    """Draw and write it.

    Raises:
        ConfigurationError, PlatformError: as :func:`~.picture.save_figure`.
    """
    save_figure(lambda: _figure(picture), destination, flag)


def _figure(picture: AbilityPicture) -> Any:
    from matplotlib.figure import Figure

    number = len(picture.names)
    figure = Figure(figsize=(WIDTH, 1.9 + 0.42 * number), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    _draw(left, picture.damage, picture.names, "Cross entropy more, nats", "text that is read")
    left.set_ylabel("whose neurons are left out")
    _draw(right, picture.overlap, picture.names, "Overlap of neurons (Jaccard)", "")
    return figure


def _draw(panel: Any, table: Sequence[Sequence[float]], names: Sequence[str], title: str, below: str) -> None:
    dress(panel)
    panel.grid(False)
    finite = [value for row in table for value in row if math.isfinite(value)]
    low, high = min(0.0, *finite), max(finite)
    image = panel.imshow(
        table, cmap=SEQUENTIAL, vmin=low, vmax=high if high > low else low + 1, aspect="auto"
    )
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            colour = "white" if image.norm(value) < 0.45 else "black"
            weight = "bold" if value == max(row) else "normal"
            panel.text(
                x, y, f"{value:.2f}", ha="center", va="center", fontsize=SMALL_SIZE, color=colour,
                fontweight=weight,
            )  # fmt: skip
    panel.set_xticks(range(len(names)), names, rotation=30, ha="right")
    panel.set_yticks(range(len(names)), names)
    panel.set_xlabel(below)
    panel.set_title(title, loc="left", fontweight="bold", color=INK)
