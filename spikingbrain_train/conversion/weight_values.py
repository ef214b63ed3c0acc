"""Weights that no trained model has: NaN, infinity, or nothing but zeros."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ALLOW_DAMAGED_WEIGHTS = "--allow-damaged-weights"


class Inspection:
    """Looks at a tensor that comes in blocks of rows, one after the other."""

    def __init__(self, first_row: int = 0) -> None:
        self._row = first_row
        self._not_finite: str | None = None
        self._is_zero = True
        self._is_empty = True

    def look_at(self, block: Tensor) -> None:
        """The next rows, floating-point and on CPU.

        One pass over its memory and no copy: minimum and maximum are NaN where any number is.
        """
        row = self._row
        self._row += block.shape[0] if block.dim() else 0
        if block.numel() == 0 or self._not_finite is not None:
            return
        self._is_empty = False
        low, high = (bound.item() for bound in torch.aminmax(block))
        if math.isnan(low):
            self._not_finite = f"holds NaN (first at {_first(block.isnan(), row)})"
        elif math.isinf(low) or math.isinf(high):
            self._not_finite = f"holds an infinity (first at {_first(block.isinf(), row)})"
        self._is_zero = self._is_zero and low == high == 0

    def fault(self, *, may_be_zero: bool) -> str | None:
        """What is wrong with the numbers so far, in words; None where nothing is.

        Args:
            may_be_zero: whether every number may be zero, as in a bias.
        """
        if self._is_zero and not self._is_empty and not may_be_zero:
            return "holds nothing but zeros"
        return self._not_finite


def fault_of(tensor: Tensor, *, may_be_zero: bool, first_row: int = 0) -> str | None:
    """What is wrong with the numbers in ``tensor``, in words; None where nothing is.

    Args:
        tensor: floating-point, on CPU.
        may_be_zero: whether every number may be zero, as in a bias.
        first_row: where ``tensor`` begins in the tensor that it is a part of.
    """
    inspection = Inspection(first_row)
    inspection.look_at(tensor)
    return inspection.fault(may_be_zero=may_be_zero)


def _first(found: Tensor, first_row: int) -> list[int]:
    """Index of the first true element, in a tensor that has ``first_row`` rows before."""
    flat = int(found.flatten().to(torch.uint8).argmax())
    index = []
    for size in reversed(found.shape):
        flat, coordinate = divmod(flat, size)
        index.append(coordinate)
    index = index[::-1]
    return [index[0] + first_row, *index[1:]] if index else index


def describe_damage(damaged: dict[str, str]) -> list[str]:
    """A note on tensors that were let through, for the report: name -> what it holds."""
    if not damaged:
        return []
    name, fault = next(iter(damaged.items()))
    more = f", and {len(damaged) - 1} more tensors are damaged" if len(damaged) > 1 else ""
    return [f"{name} {fault}{more}; copied as they are ({ALLOW_DAMAGED_WEIGHTS})"]
