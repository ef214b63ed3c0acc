"""One point of a run's curves, on its way from those who know something to those who write it down."""

from __future__ import annotations

from dataclasses import dataclass, field

from spikingbrain_train.reporting.progress import Shown
from spikingbrain_train.training.heat_map import HeatMap


@dataclass
class Report:
    """The state after ``iteration`` optimizer steps."""

    iteration: int
    """Steps done so far; 0 is before the first."""
    metrics: dict[str, float]
    """``group/name`` -> a number of all ranks."""
    heat_maps: dict[str, HeatMap] = field(default_factory=dict)
    """``group/name`` -> a table."""
    seconds_per_iteration: float | None = None
    """Recent time of one step; None in reports that are not of steps."""
    shown: dict[str, Shown] = field(default_factory=dict)
    """Those of the metrics that the progress line shows, in its order, and how."""

    def add(self, name: str, value: float, shown: Shown | None = None) -> None:
        """Add a metric.

        Args:
            name: ``group/name``.
            value: a number of all ranks.
            shown: how the progress line shows it; None leaves it to the files.
        """
        self.metrics[name] = value
        if shown is not None:
            self.shown[name] = shown
