"""A picture of what is zero inside feed-forwards: layer by layer, and along thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.reporting.plots.picture import dress, save_figure
from spikingbrain_train.reporting.plots.style import FAINT, INK, SMALL_SIZE, WIDTH, line_style


@dataclass(frozen=True)
class SparsityPicture:
    """Shares are of 1."""

    of_layers: Mapping[int, float]
    """Zeros of each layer."""
    overall: float
    threshold: float
    """That the model has; 0 is ReLU."""
    curve: Sequence[tuple[float, float, float]]
    """Threshold, share of zeros and cross entropy, by threshold."""
    fitted: float | None
    """Threshold that was chosen."""


def draw_sparsity(picture: SparsityPicture, destination: Path, flag: str = "--output") -> None:
    """Draw and write it.

    Raises:
        ConfigurationError, PlatformError: as :func:`~.picture.save_figure`.
    """
    save_figure(lambda: _figure(picture), destination, flag)


def _figure(picture: SparsityPicture) -> Any:
    from matplotlib.figure import Figure

    panels = 2 if len(picture.curve) > 1 else 1
    figure = Figure(figsize=(WIDTH, 2.9 * panels), layout="constrained", facecolor="white")
    _draw_layers(figure.add_subplot(panels, 1, 1), picture)
    if panels == 2:
        _draw_curve(figure.add_subplot(panels, 1, 2), picture)
    return figure


def _draw_layers(panel: Any, picture: SparsityPicture) -> None:
    from matplotlib.ticker import MaxNLocator

    dress(panel)
    look: dict[str, Any] = {"color": line_style(0).colour, "edgecolor": INK, "linewidth": 0.6}
    panel.bar(
        list(picture.of_layers), [100 * share for share in picture.of_layers.values()], width=0.8, **look
    )
    panel.axhline(
        100 * picture.overall, color=FAINT, linewidth=1.0, linestyle=(0, (5, 2)), label="all layers"
    )
    panel.set_ylim(0, 100)
    panel.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    panel.set_xlabel("layer")
    panel.set_ylabel("zeros, %")
    function = "ReLU" if picture.threshold == 0 else f"threshold {picture.threshold:g}"
    title = f"{100 * picture.overall:.1f} % of the channels inside feed-forwards are zero ({function})"
    panel.set_title(title, loc="left", fontweight="bold", color=INK)
    panel.legend(loc="lower right", frameon=False, fontsize=SMALL_SIZE)


def _draw_curve(panel: Any, picture: SparsityPicture) -> None:
    dress(panel)
    style = line_style(1)
    shares = [100 * share for _, share, _ in picture.curve]
    entropies = [entropy for _, _, entropy in picture.curve]
    panel.plot(shares, entropies, **style.keywords(), marker=style.marker, markersize=5, linewidth=1.6)
    for threshold, share, entropy in picture.curve:
        is_fitted = threshold == picture.fitted
        panel.annotate(
            f"{threshold:g}",
            (100 * share, entropy),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=SMALL_SIZE,
            fontweight="bold" if is_fitted else "normal",
            color=INK if is_fitted else FAINT,
        )
    panel.set_ymargin(0.15)
    panel.set_xlabel("zeros, %; beside each point its threshold" + _fitted(picture))
    panel.set_ylabel("nats per token")
    panel.set_title("Cross entropy along thresholds", loc="left", fontweight="bold", color=INK)


def _fitted(picture: SparsityPicture) -> str:
    return "" if picture.fitted is None else f", {picture.fitted:g} fitted"
