"""A picture of routers: cross entropy over the share of the neurons that every token uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.reporting.plots.picture import dress, save_figure
from spikingbrain_train.reporting.plots.style import FAINT, INK, SMALL_SIZE, WIDTH, line_style


@dataclass(frozen=True)
class RoutersPicture:
    """A curve of each router."""

    curves: Mapping[str, Sequence[tuple[float, float]]]
    """Name -> percent of the neurons that a token uses, and nats per token."""
    cross_entropy: float
    """Of the dense model."""


def draw_routers(picture: RoutersPicture, destination: Path, flag: str = "--output") -> None:
    """Draw and write it.

    Raises:
        ConfigurationError, PlatformError: as :func:`~.picture.save_figure`.
    """
    save_figure(lambda: _figure(picture), destination, flag)


def _figure(picture: RoutersPicture) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained", facecolor="white")
    panel = figure.add_subplot(1, 1, 1)
    dress(panel)
    for number, (name, curve) in enumerate(picture.curves.items()):
        style = line_style(number)
        percents, entropies = zip(*curve, strict=True)
        panel.plot(
            percents,
            entropies,
            **style.keywords(),
            marker=style.marker,
            markersize=5,
            linewidth=1.6,
            label=name,
        )
    panel.axhline(
        picture.cross_entropy, color=FAINT, linewidth=1.0, linestyle=(0, (5, 2)), label="the dense model"
    )
    panel.set_xlabel("neurons that a token uses, %")
    panel.set_ylabel("nats per token")
    panel.set_title("Experts that a dense feed-forward is cut into", loc="left", fontweight="bold", color=INK)
    panel.legend(loc="upper right", frameon=False, fontsize=SMALL_SIZE)
    return figure
