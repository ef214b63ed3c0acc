"""Linears that read INT8 numbers with a scale for each token (:mod:`spikingbrain_train.ops.int8_tokens`).

A row-parallel linear's input has a part of every token's channels on a rank: the largest magnitudes go
through one all-reduce of one number a token. The backward pass communicates nothing more than the plain
linear's, because the gradient is straight-through.
"""

from __future__ import annotations

from torch import Tensor

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.models.linears.annealed import AnnealedTransform
from spikingbrain_train.models.linears.linear_transform import Shard
from spikingbrain_train.ops.int8_tokens import codes_per_unit, int8_token_rounding, largest_magnitudes
from spikingbrain_train.reporting.progress import Shown


class Int8Inputs(AnnealedTransform):
    """The input as INT8 numbers hold it.

    Args:
        model: has no settings of it beside where it is applied.
    """

    shown = {"share": Shown("int8 inputs", "{:.0%}")}

    def __init__(self, model: ModelConfig) -> None:
        pass

    def input(self, x: Tensor, shard: Shard) -> Tensor:
        """``x + share * (rounded - x)``."""
        per_unit = codes_per_unit(shard.max(largest_magnitudes(x)))
        rounded = int8_token_rounding(x, per_unit)
        return self.faded(x, rounded)
