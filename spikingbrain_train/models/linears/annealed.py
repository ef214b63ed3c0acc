"""What transforms have in common that put quantised numbers in the place of weights or inputs.

Training fades them in: see :mod:`spikingbrain_train.architecture.annealed_quantization`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spikingbrain_train.models.linears.linear_transform import LinearTransform, TransformStatistics


class AnnealedTransform(LinearTransform):
    """A transform that may be on its way.

    Attributes:
        share: how far it has gone: 0 is the weight or input itself, 1 what quantised numbers hold.
    """

    share = 1.0

    def faded(self, x: Tensor, rounded: Tensor) -> Tensor:
        """``x + share * (rounded - x)``, with the gradient of ``rounded`` or of ``x``: both are straight."""
        return rounded if self.share == 1.0 else x + self.share * (rounded - x).detach()


class WeightErrors(TransformStatistics):
    """How far rounded weights are from the parameters: sums of squares of both, float64.

    Args:
        device: where they are kept.
    """

    size = 2

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(self.size, dtype=torch.float64, device=device)

    @property
    def counts(self) -> Tensor:
        """[size]: squares of what rounding changes, and of the weights; then what a subclass counts."""
        return self._sums

    @torch.no_grad()
    def add(self, weight: Tensor, rounded: Tensor) -> None:
        """Count a weight. Any shape and dtype."""
        norms = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in (rounded - weight, weight)]
        self._sums[:2] += torch.stack(norms).square()

    def metrics(self) -> dict[str, float]:
        """The root of their ratio, NaN before anything was counted."""
        errors, weights = self._sums[:2].tolist()
        return {"weight_error": math.sqrt(errors / weights) if weights else math.nan}
