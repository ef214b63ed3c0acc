"""How often each count occurs, and what every coding makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from spikingbrain_train.spiking.codings import CODINGS, MAX_BITS, Coding

PAPER_CODING = CODINGS["bitwise_bidirectional"]
"""In which the paper counts spikes (section 5.5): its "bitwise ternary"."""

LARGEST = 4095
"""Magnitude from which on counts share the outermost bins."""


@dataclass(frozen=True)
class OfCoding:
    """What a coding sends of some counts."""

    mean_spikes: float | None
    """Of a count, over as many steps as it takes; None where the coding does not hold all of them."""
    sparsity: float
    """Share of a window's slots that hold no spike; what does not fit the window is not sent."""
    carried: float
    """Share of counts that the window carries whole."""
    steps: int | None
    """The fewest that hold all counts; None as for ``mean_spikes``."""


class CountDistribution:
    """A histogram of signed counts. Every share is NaN before anything was counted.

    Args:
        histogram: [2 * LARGEST + 1] int64 of the counts from -LARGEST to LARGEST; None begins with zeros.
        device: where those are kept.
    """

    def __init__(self, histogram: Tensor | None = None, device: torch.device | str = "cpu") -> None:
        if histogram is None:
            histogram = torch.zeros(2 * LARGEST + 1, dtype=torch.int64, device=device)
        self.histogram = histogram

    @torch.no_grad()
    def add(self, s_int: Tensor) -> None:
        """Count some counts: whole numbers of any shape and dtype, on the histogram's device."""
        self.histogram += torch.bincount(self.bins(s_int).flatten(), minlength=2 * LARGEST + 1)

    @staticmethod
    def bins(s_int: Tensor) -> Tensor:
        """The bin of each count in the histogram, int64; arguments as of :meth:`add`."""
        return (s_int.clamp(-LARGEST, LARGEST) + LARGEST).to(torch.int64)

    @property
    def total(self) -> int:
        """Counts that were added."""
        return int(self.histogram.sum())

    def share_up_to(self, count: int) -> float:
        """Share of |s_int| <= count; 0 gives the silent ones."""
        return self._mean(_counts().abs() <= count)

    def bounds(self) -> tuple[int, int]:
        """The least and the largest count that occurs; (0, 0) of none."""
        found = self.histogram.cpu().nonzero().flatten()
        return (int(found[0]) - LARGEST, int(found[-1]) - LARGEST) if len(found) else (0, 0)

    def occurrences(self) -> tuple[int, list[int]]:
        """The least count, and how often it and each one up to the largest occur."""
        low, high = self.bounds()
        return low, self.histogram[low + LARGEST : high + LARGEST + 1].tolist()

    def of(self, coding: Coding, window: int) -> OfCoding:
        """What a coding sends.

        Args:
            coding: which.
            window: steps, of which the first carries what the coding sends first.
        """
        low, high = self.bounds()
        counts = _counts()
        least, most = coding.holds(window)
        steps = coding.steps_for(low, high) if low >= 0 or coding.has_negative else None
        mean_spikes = None if steps is None else self.mean_spikes(coding, steps)
        return OfCoding(
            mean_spikes=mean_spikes,
            sparsity=1 - self.mean_spikes(coding, window) / window,
            carried=self._mean((counts >= least) & (counts <= most)),
            steps=steps,
        )

    def mean_spikes(self, coding: Coding = PAPER_CODING, steps: int = MAX_BITS) -> float:
        """Spikes that a count sends in its first steps; by default as the paper counts them (section 5.5)."""
        return self._mean(_spikes(coding.name, steps))

    def _mean(self, values: Tensor) -> float:
        histogram = self.histogram.cpu().double()
        return float(histogram @ values.double() / histogram.sum())


@cache
def _counts() -> Tensor:
    return torch.arange(-LARGEST, LARGEST + 1)


@cache
def _spikes(coding: str, steps: int) -> Tensor:
    return CODINGS[coding].spikes_in(_counts(), steps).double()
