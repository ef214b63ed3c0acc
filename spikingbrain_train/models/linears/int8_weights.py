"""Linears that multiply by INT8 weights: what a model computes whose export stores them so.

A scale is that of a group of neighbours along the input (:mod:`spikingbrain_train.ops.int8_groups`). A
row-parallel linear holds a part of every row; where that ends inside a group, the ranks agree on the largest
magnitudes of all groups in one all-reduce of output * groups numbers a forward pass. The gradient is
straight-through: since no weight is cut off, it is the plain linear's everywhere. Scales that are stored
beside a weight (:mod:`.stored_scales`) do not follow it, and whole numbers are then not bounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.models.linears.annealed import AnnealedTransform, WeightErrors
from spikingbrain_train.models.linears.linear_transform import Shard
from spikingbrain_train.models.linears.stored_scales import LinearWithScales
from spikingbrain_train.ops.int8_groups import group_scales, group_width, int8_rounding, scales_of
from spikingbrain_train.reporting.progress import Shown


class Int8Weights(AnnealedTransform):
    """The weight as INT8 numbers hold it.

    Args:
        model: whose ``quantization.group_size`` says how many neighbours share a scale.
    """

    statistics: WeightErrors | None = None
    shown = {"share": Shown("int8", "{:.0%}"), "weight_error": Shown("int8 error", "{:.2%}")}

    def __init__(self, model: ModelConfig) -> None:
        self.group_size = model.quantization.group_size
        self._linear: LinearWithScales | None = None

    def attach(self, linear: torch.nn.Module) -> None:
        """Take the scales that the linear holds, if it does."""
        self._linear = linear if isinstance(linear, LinearWithScales) else None

    def weight(self, weight: Tensor, shard: Shard) -> Tensor:
        """``weight + share * (rounded - weight)``."""
        if self._linear is None:
            rounded = _rounded(weight, self.group_size, shard)
        else:
            scales = self._linear.scales_of_part(weight.shape[1], shard)
            rounded = int8_rounding(weight, scales, bounded=False)
        if self.statistics is not None and shard.counts_here:
            self.statistics.add(weight, rounded)
        return self.faded(weight, rounded)

    @classmethod
    def new_statistics(cls, device: torch.device) -> WeightErrors:
        return WeightErrors(device)


def _rounded(weight: Tensor, group_size: int, shard: Shard) -> Tensor:
    columns = weight.shape[1]
    parts = shard.parts if shard.axis == 1 else 1
    width = group_width(group_size, columns * parts)
    if parts == 1 or columns % width == 0:
        return int8_rounding(weight, group_scales(weight, width))
    first = shard.group.rank() * columns
    group_I = torch.arange(first, first + columns, device=weight.device) // width
    largest = weight.new_zeros(weight.shape[0], columns * parts // width)
    largest.scatter_reduce_(1, group_I.expand_as(weight), weight.detach().abs(), "amax")
    return int8_rounding(weight, scales_of(shard.max(largest))[:, group_I])
