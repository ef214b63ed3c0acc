"""A picture of neurons: how unevenly they work, and cross entropy without the weakest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.reporting.plots.picture import dress, save_figure
from spikingbrain_train.reporting.plots.style import FAINT, INK, SMALL_SIZE, WIDTH, line_style


@dataclass(frozen=True)
class NeuronsPicture:
    """Distributions over neurons and tokens, and a curve."""

    edges: Sequence[float]
    """Of the bins, ascending."""
    histograms: Mapping[str, Sequence[float]]
    """Name -> counts in the bins."""
    curve: Sequence[tuple[float, float]]
    """Percent of the neurons left out, and nats per token."""
    cross_entropy: float
    """Of the whole model."""


def draw_neurons(picture: NeuronsPicture, destination: Path, flag: str = "--output") -> None:
    """Draw and write it.

    Raises:
        ConfigurationError, PlatformError: as :func:`~.picture.save_figure`.
    """
    save_figure(lambda: _figure(picture), destination, flag)


def _figure(picture: NeuronsPicture) -> Any:
    from matplotlib.figure import Figure

    panels = 2 if picture.curve else 1
    figure = Figure(figsize=(WIDTH, 2.9 * panels), layout="constrained", facecolor="white")
    _draw_distributions(figure.add_subplot(panels, 1, 1), picture)
    if picture.curve:
        _draw_curve(figure.add_subplot(panels, 1, 2), picture)
    return figure


def _draw_distributions(panel: Any, picture: NeuronsPicture) -> None:
    dress(panel)
    used = [
        index
        for index in range(1, len(picture.edges) - 1)
        if any(h[index] for h in picture.histograms.values())
    ]
    for number, (name, counts) in enumerate(picture.histograms.items()):
        total = sum(counts) or 1.0
        shares = [100 * count / total for count in counts]
        style = line_style(number)
        panel.stairs(shares, picture.edges, label=name, color=style.colour, linewidth=1.6)
    panel.set_xscale("log")
    if used:
        panel.set_xlim(picture.edges[used[0]], picture.edges[used[-1] + 1])
    panel.set_xlabel("magnitude of a neuron at a token")
    panel.set_ylabel("% of all")
    panel.set_title("Few neurons do most of the work", loc="left", fontweight="bold", color=INK)
    panel.legend(loc="upper left", frameon=False, fontsize=SMALL_SIZE)


def _draw_curve(panel: Any, picture: NeuronsPicture) -> None:
    dress(panel)
    style = line_style(0)
    percents = [percent for percent, _ in picture.curve]
    entropies = [entropy for _, entropy in picture.curve]
    panel.plot(percents, entropies, **style.keywords(), marker=style.marker, markersize=5, linewidth=1.6)
    for percent, entropy in picture.curve:
        panel.annotate(
            f"{entropy:.3f}",
            (percent, entropy),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=SMALL_SIZE,
            color=INK,
        )
    panel.axhline(
        picture.cross_entropy, color=FAINT, linewidth=1.0, linestyle=(0, (5, 2)), label="all neurons"
    )
    panel.set_ymargin(0.15)
    panel.set_xlabel("neurons left out at every token, those of the lowest output norm, %")
    panel.set_ylabel("nats per token")
    panel.set_title("Cross entropy without the weakest neurons", loc="left", fontweight="bold", color=INK)
    panel.legend(loc="upper left", frameon=False, fontsize=SMALL_SIZE)
