"""Streaming statistics of spike counts: how many channels fire, how often, and how full a window of steps is.

Spikes are counted as the paper counts them (SpikingBrain, arXiv 2509.05276, section 5.5): in the bitwise
ternary coding, where every 1 in the binary form of |s_int| is one spike that carries the sign. What its
numbers can and cannot mean is worked out in docs/spiking.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain_train.models.linears.linear_transform import TransformStatistics
from spikingbrain_train.spiking.codings import MAX_BITS, BitwiseBidirectional

NUM_BINS = 1024
"""Bins of the histogram: |s_int| = 0, 1, ..., NUM_BINS - 2, and everything above in the last."""

# Said, because this file may be imported while a model is built on a GPU.
_MAGNITUDES = torch.arange(NUM_BINS, device="cpu")
_CODING = BitwiseBidirectional()


class SpikeStatistics(TransformStatistics):
    """A histogram of |s_int|, and what follows from it. Every share is NaN before anything was counted.

    Counts of several ranks are combined by adding up their ``histogram``.

    Args:
        device: where the histogram is kept.

    Attributes:
        histogram: [NUM_BINS] int64, how many channels of tokens had each |s_int|.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.histogram = torch.zeros(NUM_BINS, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, s_int: Tensor) -> None:
        """Count the channels of some tokens.

        Args:
            s_int: any shape and dtype; whole numbers of either sign, on the histogram's device.
        """
        magnitudes = s_int.abs().clamp(max=NUM_BINS - 1).flatten().to(torch.int64)
        self.histogram += torch.bincount(magnitudes, minlength=NUM_BINS)

    @property
    def counts(self) -> Tensor:
        """The histogram."""
        return self.histogram

    def metrics(self) -> dict[str, float]:
        """Sparsity, the share of channels that count at most 7, and their mean spikes (docs/spiking.md)."""
        return {
            "sparsity": self.sparsity(),
            "share_up_to_7": self.share_up_to(7),
            "mean_spikes": self.mean_spikes(),
        }

    def share_up_to(self, count: int) -> float:
        """Share of channels with |s_int| <= count; 0 gives the silent ones."""
        return self._mean(count >= _MAGNITUDES)

    def mean_spikes(self) -> float:
        """Spikes of an average channel in the bitwise ternary coding, over as many steps as it takes."""
        return self._mean(_CODING.spikes_in(_MAGNITUDES, MAX_BITS))

    def sparsity(self, steps: int = 3) -> float:
        """Share of a window's (channel, step) slots that hold no spike.

        Step t carries the t-th least significant bit of |s_int| (SpikingBrain, arXiv 2509.05276, eq. 23);
        bits that do not fit are not sent. The definition behind the published shares is not stated, and this
        one does not reproduce them: see docs/spiking.md.
        """
        return 1 - self._mean(_CODING.spikes_in(_MAGNITUDES, steps)) / steps

    def _mean(self, values: Tensor) -> float:
        histogram = self.histogram.cpu().double()
        return float(histogram @ values.double() / histogram.sum())
