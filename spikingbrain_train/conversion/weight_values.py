"""Weights that no trained model has: NaN, infinity, or nothing but zeros."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ALLOW_DAMAGED_WEIGHTS = "--allow-damaged-weights"


def fault_of(tensor: Tensor, *, may_be_zero: bool) -> str | None:
    """What is wrong with the numbers in ``tensor``, in words; None where nothing is.

    One pass over its memory and no copy: minimum and maximum are NaN where any number is.

    Args:
        tensor: floating-point, on CPU.
        may_be_zero: whether every number may be zero, as in a bias.
    """
    if tensor.numel() == 0:
        return None
    low, high = (bound.item() for bound in torch.aminmax(tensor))
    if math.isnan(low):
        return f"holds NaN (first at {_first(tensor.isnan())})"
    if math.isinf(low) or math.isinf(high):
        return f"holds an infinity (first at {_first(tensor.isinf())})"
    if low == high == 0 and not may_be_zero:
        return "holds nothing but zeros"
    return None


def _first(found: Tensor) -> list[int]:
    """Index of the first true element."""
    flat = int(found.flatten().to(torch.uint8).argmax())
    index = []
    for size in reversed(found.shape):
        flat, coordinate = divmod(flat, size)
        index.append(coordinate)
    return index[::-1]


def describe_damage(damaged: dict[str, str]) -> list[str]:
    """A note on tensors that were let through, for the report: name -> what it holds."""
    if not damaged:
        return []
    name, fault = next(iter(damaged.items()))
    more = f", and {len(damaged) - 1} more tensors are damaged" if len(damaged) > 1 else ""
    return [f"{name} {fault}{more}; copied as they are ({ALLOW_DAMAGED_WEIGHTS})"]
