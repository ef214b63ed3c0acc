"""A table of numbers as a picture, for TensorBoard and Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HeatMap:
    """Rows of non-negative numbers around 1."""

    rows: Sequence[Sequence[float]]
    row_names: Sequence[str]
    column_title: str
    """What the columns are; they are numbered from 0."""
    value_title: str

    def draw(self) -> Any:
        """A matplotlib Figure: 1 is white, more is red, less is blue; the scale ends at 2."""
        # The Figure class draws without pyplot, so no display is asked for and no figure outlives its use.
        from matplotlib.figure import Figure

        columns = len(self.rows[0])
        figure = Figure(figsize=(2.5 + 0.3 * columns, 1.2 + 0.25 * len(self.rows)), layout="constrained")
        panel = figure.subplots()
        image = panel.imshow(self.rows, cmap="RdBu_r", vmin=0.0, vmax=2.0, aspect="auto")
        panel.set_yticks(range(len(self.rows)), self.row_names)
        panel.set_xticks(range(0, columns, max(1, columns // 16)))
        panel.set_xlabel(self.column_title)
        figure.colorbar(image, label=self.value_title, extend="max")
        return figure
