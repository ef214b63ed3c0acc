"""Ternary weights (BitNet b1.58, arXiv 2402.17764, eq. 1-3): the linear transform "ternary".

Part of the modelling code of a checkpoint; needs torch only. A linear multiplies by -1, 0 and 1 times the
mean magnitude of its matrix; what is stored are the floats that these are made of.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kinds_spikingbrain import LINEAR_TRANSFORMS, Transform
from .linears_spikingbrain import LinearTransform


class TernaryWeights(LinearTransform):
    """round(W / scale) within -1 .. 1, times scale = mean |W|; the gradient is straight-through."""

    def weight(self, weight: Tensor, whole: Sequence[Tensor]) -> Tensor:
        # Each matrix has a scale of its own, whatever lay beside it in training.
        magnitudes = weight.detach().abs().sum(dtype=torch.float64)
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        scale = (magnitudes / weight.numel()).clamp(min=1e-5).to(exact)
        codes = (weight.detach().to(exact) * scale.reciprocal()).round().clamp(-1, 1)
        rounded = (codes * scale).to(weight.dtype)
        return weight + (rounded - weight).detach() if torch.is_grad_enabled() else rounded


LINEAR_TRANSFORMS.register(Transform("ternary", TernaryWeights))

__all__ = ["TernaryWeights"]
