"""Where the runs of a picture lie on its axis: one from 0, several from 0, or one behind the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from spikingbrain_train.reporting.plots.lineage import in_order
from spikingbrain_train.reporting.plots.names import names_by_folder, names_of
from spikingbrain_train.reporting.plots.recording import Axis, Recording, Series
from spikingbrain_train.reporting.plots.style import LineStyle, line_style


class Arrangement(str, Enum):
    """How runs share an axis."""

    one = "one"
    sequence = "sequence"
    """Each starts from the one before: laid end to end."""
    comparison = "comparison"
    """All from 0."""


@dataclass(frozen=True)
class Run:
    """A run at its place in a picture."""

    recording: Recording
    name: str
    style: LineStyle
    start: float
    """Where its first step lies on the axis."""
    end: float
    """Where its last drawn point lies."""
    axis: Axis
    until: int | None = None
    """The last iteration that is drawn, where the next run started from an earlier one than the last."""

    def series(self, metric: str) -> Series:
        """The points of a metric that are drawn, at their places."""
        found = self.recording.series(metric, self.axis)
        if self.until is not None:
            limit = self.recording.place(self.until, self.axis)
            found = [(x, y) for x, y in found if x <= limit]
        return sorted(((self.start + x, y) for x, y in found), key=lambda point: point[0])

    def has(self, metric: str) -> bool:
        """Whether there is a number to draw."""
        return metric in self.recording.metrics


@dataclass(frozen=True)
class Row:
    """The runs of a picture."""

    arrangement: Arrangement
    axis: Axis
    runs: list[Run]

    @property
    def begin(self) -> float:
        """Where the axis begins."""
        return min(run.start for run in self.runs)

    @property
    def end(self) -> float:
        """Where the axis ends."""
        return max(max(run.end for run in self.runs), self.begin + 1e-9)

    def of(self, having: Sequence[Run]) -> Row:
        """The part of the axis on which these runs lie; all of it where they are compared."""
        if self.arrangement is not Arrangement.sequence:
            return self
        first, last = self.runs.index(having[0]), self.runs.index(having[-1])
        return replace(self, runs=self.runs[first : last + 1])

    @property
    def is_comparison(self) -> bool:
        """Whether several runs lie above each other."""
        return self.arrangement is Arrangement.comparison


def arrange(
    recordings: Sequence[Recording],
    axis: Axis = Axis.tokens,
    *,
    compare: bool = False,
    names: Sequence[str] | None = None,
) -> Row:
    """Lay runs out: on one axis from 0, or end to end in the order in which each starts from the one before.

    Args:
        recordings: in any order.
        axis: what they are drawn over.
        compare: all from 0.
        names: one for each recording; None finds some.

    Raises:
        ConfigurationError: they do not follow each other, and are not to be compared; names that do not fit.
        DataError: a run does not say how many tokens or hours it took.
    """
    if len(recordings) == 1:
        compare = False
    if compare:
        called = names_of(recordings, names)
        runs = [
            Run(each, name, line_style(number), 0.0, each.end(axis), axis)
            for number, (each, name) in enumerate(zip(recordings, called, strict=True))
        ]
        return Row(Arrangement.comparison, axis, runs)
    called = names_of(recordings, names) if names is not None else names_by_folder(recordings)
    name_of = {id(each): name for each, name in zip(recordings, called, strict=True)}
    runs, start = [], 0.0
    for number, stage in enumerate(in_order(recordings)):
        each, until = stage.recording, stage.until
        length = each.end(axis) if until is None else each.place(until, axis)
        runs.append(Run(each, name_of[id(each)], line_style(number), start, start + length, axis, until))
        start += length
    return Row(Arrangement.one if len(runs) == 1 else Arrangement.sequence, axis, runs)


def last_number(series: Series) -> float | None:
    """The last value of a series that is one, None where there is none."""
    return next((y for _, y in reversed(series) if math.isfinite(y)), None)
