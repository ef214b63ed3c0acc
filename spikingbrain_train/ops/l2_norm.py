"""Vectors of length 1, as queries and keys of the delta rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_EPS = 1e-6  # as in flash-linear-attention and in transformers' Qwen3-Next


def l2_norm(x: Tensor) -> Tensor:
    """``x / sqrt(sum(x^2) + 1e-6)`` over the last dimension.

    Args:
        x: [..., D], floating point.

    Returns:
        [..., D] in x's dtype, computed in at least float32. Differentiable once; kept for that are the input
        and one number a row.
    """
    return _L2Norm.apply(x)


class _L2Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = (wide.square().sum(-1, keepdim=True) + _EPS).rsqrt_()
        ctx.save_for_backward(x, inverse)
        return (wide * inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        x, inverse = ctx.saved_tensors
        grad, normed = grad_output.to(inverse.dtype), x * inverse
        # The part along the vector changes its length alone.
        along = (grad * normed).sum(-1, keepdim=True)
        return ((grad - normed * along) * inverse).to(x.dtype)
