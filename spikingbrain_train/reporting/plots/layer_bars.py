"""A picture of what swapping each layer costs, as bars, those that are chosen marked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.reporting.plots.picture import dress, save_figure
from spikingbrain_train.reporting.plots.style import FAINT, INK, SMALL_SIZE, WIDTH, line_style, number_text


@dataclass(frozen=True)
class LayerCosts:
    """KL divergences, in nats."""

    of_layers: Mapping[int, float]
    """When a layer is swapped alone; bars stand on what the model costs without a swap."""
    chosen_layers: Collection[int]
    num_layers: int
    chosen: float
    """When all the chosen ones are swapped."""
    even: float
    """When as many evenly spaced ones are."""
    kept: float
    """When none is."""


def draw_layer_costs(costs: LayerCosts, destination: Path, flag: str = "--output") -> None:
    """Draw and write the bars.

    Raises:
        ConfigurationError, PlatformError: as :func:`~.picture.save_figure`.
    """
    save_figure(lambda: _figure(costs), destination, flag)


def _figure(costs: LayerCosts) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained", facecolor="white")
    panel = figure.add_subplot()
    dress(panel)
    # Hatches tell the two apart without colour.
    kinds = (("swapped", True, line_style(0).colour, ""), ("stays", False, "white", "////"))
    for label, is_chosen, colour, hatch in kinds:
        layers = [layer for layer in costs.of_layers if (layer in costs.chosen_layers) is is_chosen]
        heights = [costs.of_layers[layer] - costs.kept for layer in layers]
        look: dict[str, Any] = {"color": colour, "edgecolor": INK, "linewidth": 0.8, "hatch": hatch}
        panel.bar(layers, heights, bottom=costs.kept, width=0.8, label=label, **look)
    panel.axhline(costs.kept, color=FAINT, linewidth=1.0, linestyle=(0, (5, 2)), label="none swapped")
    panel.set_xlim(-0.8, costs.num_layers - 0.2)
    panel.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    panel.set_xlabel("layer, swapped alone")
    panel.set_ylabel("KL(source || model), nats")
    number = len(costs.chosen_layers)
    chosen, even = number_text(costs.chosen), number_text(costs.even)
    title = f"{number} layers swapped: KL {chosen} chosen, {even} evenly spaced"
    panel.set_title(title, loc="left", fontweight="bold", color=INK)
    panel.legend(loc="upper right", frameon=False, fontsize=SMALL_SIZE)
    return figure
