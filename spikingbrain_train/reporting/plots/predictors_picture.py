"""A picture of predictors of activity: what is zero and what they leave out, and cross entropy along that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.reporting.plots.picture import dress, save_figure
from spikingbrain_train.reporting.plots.style import FAINT, INK, SMALL_SIZE, WIDTH, line_style


@dataclass(frozen=True)
class PredictorsPicture:
    """Shares are of 1."""

    zeros: Mapping[int, float]
    """Of each layer."""
    left_out: Mapping[str, Mapping[int, float]]
    """By the recall that is asked for, in words: what is not computed of each layer."""
    curve: Sequence[tuple[str, float, float]]
    """Recall in words, share that is left out, nats per token."""
    overall: float
    """Zeros of all layers."""
    cross_entropy: float
    """With all neurons."""


def draw_predictors(picture: PredictorsPicture, destination: Path, flag: str = "--output") -> None:
    """Draw and write it.

    Raises:
        ConfigurationError, PlatformError: as :func:`~.picture.save_figure`.
    """
    save_figure(lambda: _figure(picture), destination, flag)


def _figure(picture: PredictorsPicture) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 5.8), layout="constrained", facecolor="white")
    _draw_layers(figure.add_subplot(2, 1, 1), picture)
    _draw_curve(figure.add_subplot(2, 1, 2), picture)
    return figure


def _draw_layers(panel: Any, picture: PredictorsPicture) -> None:
    from matplotlib.ticker import MaxNLocator

    dress(panel)
    shares = [100 * share for share in picture.zeros.values()]
    panel.bar(list(picture.zeros), shares, width=0.8, color="#dddddd", edgecolor=FAINT, label="zeros")
    for number, (name, layers) in enumerate(picture.left_out.items()):
        style = line_style(number)
        values = [100 * share for share in layers.values()]
        label = f"left out, {name}" if name.startswith("p") else f"left out, recall {name}"
        panel.plot(list(layers), values, **style.keywords(), marker=style.marker, markersize=4, label=label)
    panel.set_ylim(0, 100)
    panel.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    panel.set_xlabel("layer")
    panel.set_ylabel("neurons of a token, %")
    panel.set_title("What is zero, and what predictors leave out", loc="left", fontweight="bold", color=INK)
    panel.legend(loc="lower right", frameon=False, fontsize=SMALL_SIZE)


def _draw_curve(panel: Any, picture: PredictorsPicture) -> None:
    dress(panel)
    style = line_style(0)
    ordered = sorted(picture.curve, key=lambda each: each[1])
    shares, entropies = [100 * share for _, share, _ in ordered], [entropy for *_, entropy in ordered]
    panel.plot(shares, entropies, **style.keywords(), marker=style.marker, markersize=5, linewidth=1.6)
    for name, share, entropy in ordered:
        panel.annotate(
            name,
            (100 * share, entropy),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=SMALL_SIZE,
            color=INK,
        )
    dashed: dict[str, Any] = {"color": FAINT, "linewidth": 1.0, "linestyle": (0, (5, 2))}
    panel.axhline(picture.cross_entropy, label="all neurons", **dashed)
    panel.axvline(100 * picture.overall, label="zeros", color=FAINT, linewidth=1.0, linestyle=(0, (1, 2)))
    panel.set_ymargin(0.15)
    panel.set_xlabel("neurons left out at a token, %; beside each point the recall that was asked for")
    panel.set_ylabel("nats per token")
    panel.set_title("Cross entropy with predicted neurons", loc="left", fontweight="bold", color=INK)
    panel.legend(loc="upper left", frameon=False, fontsize=SMALL_SIZE)
