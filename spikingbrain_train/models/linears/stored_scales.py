"""Linears that hold the scales of their weight beside it, as a W8ASpike checkpoint has them.

Scales of the whole matrix, [rows, groups, 1] in float32 whatever the weights are in, lie on every rank as a
buffer: they are a 128th of the weights, and need no split that follows the weight's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.models.linears.linear_transform import Shard
from spikingbrain_train.ops.int8_groups import group_width


class LinearWithScales(torch.nn.Module):
    """What :func:`with_stored_scales` adds to a linear class.

    Attributes:
        weight_scales: [rows, groups, 1] float32 of the whole matrix.
    """

    weight: Tensor
    weight_scales: Tensor
    whole_shape: Callable[[Any], tuple[int, int]]
    group_size: int
    row_blocks: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rows, inputs = type(self).whole_shape(self)
        ones = torch.ones(rows, inputs // group_width(self.group_size, inputs), 1)
        self.register_buffer("weight_scales", ones.to(self.weight.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
        scales = self.weight_scales
        super()._apply(fn, recurse)
        if self.weight_scales.dtype is not scales.dtype:
            self.weight_scales = scales.to(self.weight_scales.device)
        return self

    def scales_of_part(self, columns: int, shard: Shard) -> Tensor:
        """[rows, columns or groups] scales of this rank's part of the weight.

        Args:
            columns: inputs of the part.
            shard: which part of the weight it is.
        """
        scales_ON, rank = self.weight_scales.squeeze(-1), shard.group.rank()
        if shard.parts == 1:
            return scales_ON
        if shard.axis == 0:
            # Gate and up projection lie below each other, and a rank holds a part of both.
            return scales_ON.view(self.row_blocks, shard.parts, -1, scales_ON.shape[1])[:, rank].flatten(0, 1)
        width = columns * shard.parts // scales_ON.shape[1]
        first = rank * columns
        of_columns = torch.arange(first, first + columns, device=scales_ON.device) // width
        return scales_ON[:, of_columns]


def with_stored_scales(
    linear_class: type, model: ModelConfig, projection: Projection, split_axis: int | None
) -> type:
    """A subclass of a linear class that holds scales of its weight.

    Args:
        linear_class: with a parameter ``weight`` [rows, inputs], or a tensor-parallel rank's part of it.
        model: whose ``quantization.group_size`` says how many neighbours along the input share a scale.
        projection: what the linear projects; gate and up projection lie below each other, and a rank holds a
            part of both.
        split_axis: the axis of the weight that ranks share out; None where every rank holds all of it.
    """

    def whole_shape(self: Any) -> tuple[int, int]:
        shape = list(self.weight.shape)
        if split_axis is not None:
            whole = (self.output_size, self.input_size) if hasattr(self, "input_size") else None
            assert whole is not None, f"{linear_class.__name__} does not say how large its whole weight is"
            shape = list(whole)
        return shape[0], shape[1]

    attributes = {
        "whole_shape": whole_shape,
        "group_size": model.quantization.group_size,
        "row_blocks": 2 if projection is Projection.mlp_fc1 else 1,
        "__doc__": linear_class.__doc__,
    }
    return type(f"Scaled{linear_class.__name__}", (LinearWithScales, linear_class), attributes)
