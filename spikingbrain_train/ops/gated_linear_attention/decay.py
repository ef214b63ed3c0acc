"""Sums of log gates between two tokens. Always sums from one end, never differences of longer sums: a log
gate of -50 then costs no precision elsewhere, and one of -inf makes no NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sum_from_start(log_gate: Tensor, dim: int) -> Tensor:
    """Sum of the log gates up to and including each token: how a query sees a state before them."""
    return log_gate.cumsum(dim)


def sum_to_end(log_gate: Tensor, dim: int) -> Tensor:
    """Sum of the log gates after each token: the decay of a key on its way to the end."""
    others = log_gate.narrow(dim, 1, log_gate.shape[dim] - 1)
    after = torch.cat((others, torch.zeros_like(log_gate.narrow(dim, 0, 1))), dim)
    return after.flip(dim).cumsum(dim).flip(dim)
