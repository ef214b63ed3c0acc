"""An axis over stages of very different length, on which the shortest can still be seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spikingbrain_train.reporting.plots.rows import Arrangement, Row, Run

NARROWEST = 0.14
"""Share of the axis that the shortest stage gets at least (less where they are many)."""


class StageScale:
    """Every stage is linear, with a scale of its own where the shortest would be too narrow.

    Works on numbers and on arrays, element by element.
    """

    def __init__(self, bounds: Sequence[float], shares: Sequence[float]) -> None:
        self._bounds = list(bounds)
        self._shares = list(shares)
        self._places = [0.0]
        for share in shares:
            self._places.append(self._places[-1] + share)

    @classmethod
    def of(cls, row: Row) -> StageScale | None:
        """The scale of a sequence one of whose stages would be too narrow, None elsewhere."""
        if row.arrangement is not Arrangement.sequence or len(row.runs) < 2:
            return None
        lengths = [run.end - run.start for run in row.runs]
        least = min(NARROWEST, 0.6 / len(lengths))
        shares = [length / (row.end - row.begin) for length in lengths]
        if min(shares) >= least or min(lengths) <= 0:
            return None
        wide = sum(share for share in shares if share >= least)
        left = 1.0 - least * sum(share < least for share in shares)
        shown = [least if share < least else max(least, share * left / wide) for share in shares]
        return cls([row.begin, *(run.end for run in row.runs)], [share / sum(shown) for share in shown])

    def share(self, number: int) -> float:
        """Of the axis, that a stage gets."""
        return self._shares[number]

    def forward(self, values: Any) -> Any:
        """From a place to a share of the axis."""
        return self._map(values, self._bounds, self._places)

    def backward(self, values: Any) -> Any:
        """From a share of the axis to a place."""
        return self._map(values, self._places, self._bounds)

    def ticks(self) -> list[float]:
        """The ends of all stages, and round numbers in between where there is room."""
        from matplotlib.ticker import MaxNLocator

        found = list(self._bounds)
        for left, right, share in zip(self._bounds, self._bounds[1:], self._shares, strict=False):
            between = MaxNLocator(max(1, int(9 * share)), steps=[1, 2, 5, 10]).tick_values(left, right)
            room = 0.07 * (right - left) / share
            found += [float(each) for each in between if left + room < each < right - room]
        return sorted(found)

    @staticmethod
    def _map(values: Any, ones: Sequence[float], others: Sequence[float]) -> Any:
        """Piecewise linear from ``ones`` to ``others``, beyond their ends as in the first and last piece."""
        slopes = [
            (right - left) / (end - begin)
            for begin, end, left, right in zip(ones, ones[1:], others, others[1:], strict=False)
        ]
        result = others[0] + slopes[0] * (values - ones[0])
        for bend, before, after in zip(ones[1:-1], slopes, slopes[1:], strict=False):
            beyond = values - bend
            result = result + (after - before) * (beyond + abs(beyond)) / 2
        return result


def share_of(row: Row, run: Run) -> float:
    """How much of the axis a run takes, 0 to 1."""
    scale = StageScale.of(row)
    if scale is not None:
        return scale.share(row.runs.index(run))
    return (run.end - run.start) / (row.end - row.begin)


def share_before(row: Row, place: float) -> float:
    """How much of the axis lies before a place, 0 to 1."""
    scale = StageScale.of(row)
    if scale is not None:
        return float(scale.forward(place))
    return (place - row.begin) / (row.end - row.begin)
