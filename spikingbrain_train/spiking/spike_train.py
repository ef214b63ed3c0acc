"""A train of spikes: what a count of spikes looks like over time, and what each step of it is worth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpikeTrain:
    """Spikes over T steps; the counts are ``sum over t of step_weights[t] * spikes[t]``.

    SpikingBrain, arXiv 2509.05276, eq. 22-23.
    """

    spikes: Tensor
    """[T, ...] int8: -1, 0 or 1."""
    step_weights: tuple[int, ...]
    """T: what a spike of each step adds to the count, a power of two with a sign."""

    def decode(self) -> Tensor:
        """The counts [...], int64."""
        counts = torch.zeros(self.spikes.shape[1:], dtype=torch.int64, device=self.spikes.device)
        for spikes, weight in zip(self.spikes, self.step_weights, strict=True):
            counts.add_(spikes.to(torch.int64), alpha=weight)
        return counts

    @property
    def num_spikes(self) -> int:
        """Slots (channel, step) that hold a spike."""
        return int(self.spikes.count_nonzero())

    @property
    def sparsity(self) -> float:
        """Share of slots that hold none; NaN without slots."""
        slots = self.spikes.numel()
        return 1 - self.num_spikes / slots if slots else float("nan")
