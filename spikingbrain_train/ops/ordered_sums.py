"""Sums along a sequence whose order is always the same."""

from __future__ import annotations

import torch
from torch import Tensor


def cumulative_sum(x: Tensor, dim: int) -> Tensor:
    """``x.cumsum(dim)``; under torch's deterministic algorithms in the same order every time, on GPUs too.

    torch's own kernel for GPUs has no such form and is refused there.

    Args:
        x: any shape, floating point.
        dim: along which is summed.
    """
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return by_doubling(x, dim)
    return x.cumsum(dim)


def by_doubling(x: Tensor, dim: int) -> Tensor:
    """The same in log2(size) additions of whole tensors (Hillis and Steele, 1986).

    Only additions: -inf stays -inf, and what comes before it is as it was.
    """
    size, step = x.shape[dim], 1
    while step < size:
        later = x.narrow(dim, step, size - step) + x.narrow(dim, 0, size - step)
        x = torch.cat((x.narrow(dim, 0, step), later), dim)
        step *= 2
    return x
