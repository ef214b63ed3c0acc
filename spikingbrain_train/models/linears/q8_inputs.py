"""Linears that read INT8 numbers with a scale for each block (:mod:`spikingbrain_train.ops.int8_blocks`).

A block lies on one rank (``Q8InputsKind.check_split``), so that nothing is communicated; the backward pass
is the plain linear's, because the gradient is straight-through.
"""

from __future__ import annotations

from torch import Tensor

from spikingbrain_train.architecture.q8_inputs import block_of
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.models.linears.annealed import AnnealedTransform
from spikingbrain_train.models.linears.linear_transform import Shard
from spikingbrain_train.ops.int8_blocks import int8_block_rounding
from spikingbrain_train.reporting.progress import Shown


class Q8Inputs(AnnealedTransform):
    """The input as blocks of INT8 numbers hold it.

    Args:
        model: has no settings of it beside where it is applied.
    """

    shown = {"share": Shown("q8 inputs", "{:.0%}")}

    def __init__(self, model: ModelConfig) -> None:
        pass

    def input(self, x: Tensor, shard: Shard) -> Tensor:
        """``x + share * (rounded - x)``; the block is that of the whole input's width."""
        return self.faded(x, int8_block_rounding(x, block_of(x.shape[-1] * shard.parts)))
