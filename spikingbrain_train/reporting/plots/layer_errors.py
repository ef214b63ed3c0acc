"""A picture of what INT8 weights of each layer are off by, plain rounding beside GPTQ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.reporting.plots.picture import dress, save_figure
from spikingbrain_train.reporting.plots.style import INK, SMALL_SIZE, WIDTH, line_style


@dataclass(frozen=True)
class LayerErrors:
    """Errors of each layer's outputs over the outputs: 0.01 is one per cent."""

    plain: Sequence[float]
    gptq: Sequence[float] | None
    """None where it was not asked for."""


def draw_layer_errors(errors: LayerErrors, destination: Path, flag: str = "--output") -> None:
    """Draw and write the bars.

    Raises:
        ConfigurationError, PlatformError: as :func:`~.picture.save_figure`.
    """
    save_figure(lambda: _figure(errors), destination, flag)


def _figure(errors: LayerErrors) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained", facecolor="white")
    panel = figure.add_subplot()
    dress(panel)
    # Hatches tell the two apart without colour.
    colour = line_style(0).colour
    plain = (colour, "") if errors.gptq is None else ("white", "////")
    kinds: list[tuple[str, Sequence[float], str, str]] = [("plain rounding", errors.plain, *plain)]
    if errors.gptq is not None:
        kinds.append(("GPTQ", errors.gptq, colour, ""))
    width = 0.8 / len(kinds)
    for number, (label, values, face, hatch) in enumerate(kinds):
        places = [layer + (number - (len(kinds) - 1) / 2) * width for layer in range(len(values))]
        look: dict[str, Any] = {"color": face, "edgecolor": INK, "linewidth": 0.6, "hatch": hatch}
        panel.bar(places, [100 * value for value in values], width=width, label=label, **look)
    panel.set_xlim(-0.8, len(errors.plain) - 0.2)
    panel.set_ylim(bottom=0)
    panel.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    panel.set_xlabel("layer")
    panel.set_ylabel("error of outputs, %")
    panel.set_title("What INT8 weights are off by", loc="left", fontweight="bold", color=INK)
    if len(kinds) > 1:
        panel.legend(loc="upper right", frameon=False, fontsize=SMALL_SIZE)
    return figure
