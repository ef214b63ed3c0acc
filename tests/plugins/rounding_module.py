"""A linear transform from outside, the part with torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.models.linears.linear_transform import LinearTransform, Shard, TransformStatistics
from spikingbrain_train.reporting.progress import Shown
from tests.plugins.rounding import ROUNDED_WEIGHTS


class RoundedWeights(LinearTransform):
    """Multiplies by multiples of a step, and learns as if it did not.

    Attributes:
        step: in multiples of the mean magnitude of the whole matrix.
    """

    statistics: ZeroWeights | None = None
    shown = {"step": Shown("step", "{:.2f}"), "zeros": Shown("zero weights", "{:.0%}")}

    def __init__(self, model: ModelConfig) -> None:
        self.step = ROUNDED_WEIGHTS.own_settings(model).step

    def weight(self, weight: Tensor, shard: Shard) -> Tensor:
        magnitudes = shard.sum(weight.detach().abs().sum(dtype=torch.float64))
        step = self.step * magnitudes / (weight.numel() * shard.parts)
        rounded = _Rounded.apply(weight, step)
        if self.statistics is not None and shard.counts_here:
            self.statistics.add(rounded)
        return rounded

    @classmethod
    def new_statistics(cls, device: torch.device) -> ZeroWeights:
        return ZeroWeights(device)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor) -> Tensor:
        return naively_rounded(weight, step)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


def naively_rounded(weight: Tensor, step: Tensor) -> Tensor:
    """``weight`` as whole multiples of ``step``."""
    return (torch.round(weight.double() / step) * step).to(weight.dtype)


class ZeroWeights(TransformStatistics):
    """The share of weights that are rounded to zero."""

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)

    @property
    def counts(self) -> Tensor:
        return self._counts

    def add(self, rounded: Tensor) -> None:
        """Count the elements of a weight."""
        self._counts += torch.stack([(rounded == 0).sum(), torch.tensor(rounded.numel())])

    def metrics(self) -> dict[str, float]:
        zeros, all_weights = self._counts.tolist()
        return {"zeros": zeros / all_weights}
