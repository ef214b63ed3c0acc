"""The linear transform "rounding" in exports, which carry this file; see rounding.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .kinds_spikingbrain import LINEAR_TRANSFORMS, Transform
from .linears_spikingbrain import LinearTransform


class RoundedWeights(LinearTransform):
    """Multiplies by multiples of a share of the mean magnitude of the matrix that was trained as one."""

    def __init__(self, config, linear: nn.Linear) -> None:
        super().__init__(config, linear)
        self.step = config.kinds["rounding"]["step"]

    def weight(self, weight: Tensor, whole: Sequence[Tensor]) -> Tensor:
        magnitudes = sum(part.detach().abs().sum(dtype=torch.float64) for part in whole)
        step = self.step * magnitudes / sum(part.numel() for part in whole)
        rounded = (torch.round(weight.detach().double() / step) * step).to(weight.dtype)
        return weight + (rounded - weight).detach() if torch.is_grad_enabled() else rounded


LINEAR_TRANSFORMS.register(Transform("rounding", RoundedWeights))
