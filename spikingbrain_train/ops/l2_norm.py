"""Vectors of length 1."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6
"""Below the root, as in flash-linear-attention and in transformers' Qwen3-Next."""


def l2_norm(x: Tensor) -> Tensor:
    """``x / sqrt(sum(x^2) + 1e-6)`` over the last dimension, computed in at least float32, in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + EPS)).to(x.dtype)
