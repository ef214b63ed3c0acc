"""Colours, dashes, markers, type sizes and numbers on axes, for a picture of 800 pixels' width.

What tells two lines apart is never colour alone: each has dashes and a marker of its own, for colour-blind
readers and for print. The first colours are of Okabe and Ito, neighbours of different lightness.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

WIDTH = 8.0
"""Inches of a picture; 100 pixels of an 800 pixels' wide one each."""
DPI = 150

INK, FAINT, GRID = "#222222", "#555555", "#d9d9d9"
TITLE_SIZE, TEXT_SIZE, SMALL_SIZE = 11.0, 10.0, 9.0
"""Points: 15, 14 and 12.5 pixels of a picture that is shown 800 pixels wide."""

SEQUENTIAL = "cividis"
"""Colour map of tables: lightness grows evenly, and colour-blind readers see it as others do."""

Dashes = tuple[float, tuple[float, ...]]


@dataclass(frozen=True)
class LineStyle:
    """How the lines of one run or layer look."""

    colour: str
    dashes: Dashes | str
    marker: str

    def keywords(self) -> dict[str, Any]:
        """For matplotlib's plot."""
        return {"color": self.colour, "linestyle": self.dashes}


_COLOURS = ("#0072b2", "#d55e00", "#000000", "#009e73", "#aa4499", "#b07d00", "#4aa3df")
_DASHES: tuple[Dashes | str, ...] = (
    "solid",
    (0, (5, 1.6)),
    (0, (1.2, 1.2)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (9, 2)),
    (0, (3, 1.2, 1.2, 1.2, 1.2, 1.2)),
    (0, (2.5, 2.5)),
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")


def line_style(number: int) -> LineStyle:
    """The style of the n-th line; 70 differ."""
    lap = number // len(_COLOURS)
    return LineStyle(
        _COLOURS[number % len(_COLOURS)],
        _DASHES[(number + lap) % len(_DASHES)],
        _MARKERS[number % len(_MARKERS)],
    )


def count_text(value: float) -> str:
    """A count in few characters: 0, 512, 1.5k, 20M, 100B, 2T."""
    size = abs(value)
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= 0.9995 * unit:
            return f"{value / unit:.3g}{name}" if size < 999.5 * unit else f"{value / unit:.0f}{name}"
    return f"{value:.3g}" if size < 999.5 else f"{value:.0f}"


def number_text(value: float) -> str:
    """A number in few characters: 0, 12.5, 0.02, 5e-4."""
    if not math.isfinite(value):
        return "no number"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, _, power = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(power)}"


def shortened(text: str, length: int) -> str:
    """Text of at most ``length`` characters; what is cut is cut from its middle."""
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return f"{text[: length - 1 - end]}…{text[len(text) - end :]}"
