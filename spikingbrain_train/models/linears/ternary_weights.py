"""Linears that multiply by ternary weights: what a model computes whose export stores two bits a weight.

The scale is the mean magnitude of a whole matrix (:mod:`spikingbrain_train.ops.ternary`), of which a
tensor-parallel rank holds a part: one all-reduce of one number a matrix, float64, in every forward pass. q, k
and v lie in one weight, and so do gate and up projection; each has a scale of its own, as in every export.
The gradient is straight-through.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.models.linears.annealed import AnnealedTransform, WeightErrors
from spikingbrain_train.models.linears.linear_transform import Shard
from spikingbrain_train.ops.ternary import magnitude_sum, ternary_rounding, ternary_scales
from spikingbrain_train.reporting.progress import Shown


class TernaryWeights(AnnealedTransform):
    """The weight as ternary numbers hold it.

    Args:
        model: has no settings of it beside where it is applied.
    """

    statistics: TernaryCounts | None = None
    shown = {
        "share": Shown("ternary", "{:.0%}"),
        "zeros": Shown("zero weights", "{:.0%}"),
    }

    def __init__(self, model: ModelConfig) -> None:
        pass

    def weight(self, weight: Tensor, shard: Shard) -> Tensor:
        """``weight + share * (rounded - weight)``."""
        rounded = ternary_rounding(weight, row_scales(weight, shard))
        if self.statistics is not None and shard.counts_here:
            self.statistics.add(weight, rounded)
        return self.faded(weight, rounded)

    @classmethod
    def new_statistics(cls, device: torch.device) -> TernaryCounts:
        return TernaryCounts(device)


def row_scales(weight: Tensor, shard: Shard) -> Tensor:
    """Mean magnitude of the whole matrix that each row of a weight belongs to, without a gradient.

    Args:
        weight: [rows, inputs], a rank's part of one matrix or of several.
        shard: which part that is.

    Returns:
        [rows, 1], or [] for one matrix; float32 (float64 for float64 weights).
    """
    joined = shard.joined
    parts = (weight,) if joined is None else joined.parts(weight)
    magnitudes = shard.sum(torch.stack([magnitude_sum(part) for part in parts]))
    # Filled where the weight is: a copy to a GPU would be waited for, in every linear.
    numel = torch.stack(
        [weight.new_full((), part.numel() * shard.parts, dtype=torch.int64) for part in parts]
    )
    scales = ternary_scales(magnitudes, numel, weight.dtype)
    if joined is None:
        return scales[0]
    return scales[joined.matrix_of_rows(len(weight), weight.device)].unsqueeze(1)


class TernaryCounts(WeightErrors):
    """How many ternary weights are zero, and how far they are from the parameters."""

    size = 4

    @torch.no_grad()
    def add(self, weight: Tensor, rounded: Tensor) -> None:
        """Count a weight. Any shape and dtype."""
        super().add(weight, rounded)
        zeros = (rounded == 0).sum(dtype=torch.float64)
        self._sums[2:] += torch.stack([zeros, zeros.new_full((), weight.numel())])

    def metrics(self) -> dict[str, float]:
        """Shares; NaN before anything was counted."""
        zeros, weights = self._sums[2:].tolist()
        return {"zeros": zeros / weights if weights else math.nan, **super().metrics()}
