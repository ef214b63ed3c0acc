"""Weights that no trained model has: NaN, infinity, or nothing but zeros."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from spikingbrain_train.checkpoint.saved_tensor import Block
from spikingbrain_train.errors import CheckpointError

ALLOW_DAMAGED_WEIGHTS = "--allow-damaged-weights"


class Inspection:
    """Looks at a tensor that comes in blocks, one after the other along an axis.

    Args:
        begin: index of the first element of the first block.
        axis: along which they follow each other.
    """

    def __init__(self, begin: Sequence[int] = (0,), axis: int = 0) -> None:
        self._begin = list(begin)
        self._axis = axis
        self._not_finite: str | None = None
        self._is_zero = True
        self._is_empty = True

    def look_at(self, block: Tensor) -> None:
        """The next block, floating-point and on CPU.

        One pass over its memory and no copy: minimum and maximum are NaN where any number is.
        """
        begin = list(self._begin)
        if block.dim():
            self._begin[self._axis] += block.shape[self._axis]
        if block.numel() == 0 or self._not_finite is not None:
            return
        self._is_empty = False
        low, high = (bound.item() for bound in torch.aminmax(block))
        if math.isnan(low):
            self._not_finite = f"holds NaN (first at {_first(block.isnan(), begin)})"
        elif math.isinf(low) or math.isinf(high):
            self._not_finite = f"holds an infinity (first at {_first(block.isinf(), begin)})"
        self._is_zero = self._is_zero and low == high == 0

    def fault(self, *, may_be_zero: bool) -> str | None:
        """What is wrong with the numbers so far, in words; None where nothing is.

        Args:
            may_be_zero: whether every number may be zero, as in a bias.
        """
        if self._is_zero and not self._is_empty and not may_be_zero:
            return "holds nothing but zeros"
        return self._not_finite


def inspected(
    blocks: Iterable[Block],
    inspection: Inspection,
    refuse: Callable[[str], CheckpointError] | None,
) -> Iterator[Block]:
    """Blocks of a tensor as they pass an inspection, which lets zeros through.

    Args:
        blocks: the tensor.
        inspection: of it; has seen all of it in the end.
        refuse: the error that a fault is, in words; None lets it through.
    """
    for block in blocks:
        if block.values.is_floating_point():
            inspection.look_at(block.values)
        fault = inspection.fault(may_be_zero=True)
        if fault is not None and refuse is not None:
            raise refuse(fault)
        yield block


def fault_of(tensor: Tensor, *, may_be_zero: bool, first_row: int = 0) -> str | None:
    """What is wrong with the numbers in ``tensor``, in words; None where nothing is.

    Args:
        tensor: floating-point, on CPU.
        may_be_zero: whether every number may be zero, as in a bias.
        first_row: where ``tensor`` begins in the tensor that it is a part of.
    """
    inspection = Inspection((first_row,))
    inspection.look_at(tensor)
    return inspection.fault(may_be_zero=may_be_zero)


def _first(found: Tensor, begin: Sequence[int]) -> list[int]:
    """Index of the first true element, in a tensor of which this part begins there."""
    flat = int(found.flatten().to(torch.uint8).argmax())
    index = []
    for size in reversed(found.shape):
        flat, coordinate = divmod(flat, size)
        index.append(coordinate)
    return [at + first for at, first in zip_longest(index[::-1], begin[: found.dim()], fillvalue=0)]


def describe_damage(damaged: dict[str, str]) -> list[str]:
    """A note on tensors that were let through, for the report: name -> what it holds."""
    if not damaged:
        return []
    name, fault = next(iter(damaged.items()))
    more = f", and {len(damaged) - 1} more tensors are damaged" if len(damaged) > 1 else ""
    return [f"{name} {fault}{more}; copied as they are ({ALLOW_DAMAGED_WEIGHTS})"]
