"""Many small triangular systems at once, as products of matrices.

LAPACK solves one system after the other, each too small to be fast: at 64 unknowns and 128 right sides that
takes several times as long as the products here. Blocks of the inverse are put together as in
flash-linear-attention's solve_tril::

    [[P, 0], [R, S]]^-1 = [[P^-1, 0], [-S^-1 R P^-1, S^-1]]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BASE = 8
"""Size of the blocks that are inverted as a product: of a strictly lower A, A^8 is 0."""


def solve_unit_lower(A: Tensor, right: Tensor) -> Tensor:
    """``(I + A)^-1 right``, for strictly lower triangular A.

    Args:
        A: [..., C, C]; what stands on and above its diagonal is taken for zeros. C is a power of two, at
            least 8.
        right: [..., C, columns] in A's dtype.
    """
    solution: Tensor = _SolveUnitLower.apply(A, right)
    return solution


class _SolveUnitLower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, right: Tensor) -> Tensor:
        inverse = inverse_unit_lower(A)
        solution = inverse @ right
        ctx.save_for_backward(inverse, solution)
        return solution

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        inverse, solution = ctx.saved_tensors
        grad_right = inverse.transpose(-1, -2) @ grad
        grad_A = (grad_right @ solution.transpose(-1, -2)).neg_().tril_(-1)
        return grad_A, grad_right


def inverse_unit_lower(A: Tensor) -> Tensor:
    """``(I + A)^-1`` of the part of A [..., C, C] below its diagonal, C a power of two and at least 8."""
    C = A.shape[-1]
    block = A.unflatten(-1, (-1, _BASE)).unflatten(-3, (-1, _BASE)).diagonal(dim1=-4, dim2=-2)
    base = block.movedim(-1, -3).tril(-1)
    square, one = base @ base, torch.eye(_BASE, dtype=A.dtype, device=A.device)
    blocks = (one - base) @ (one + square) @ (one + square @ square)
    size = _BASE
    while size < C:
        pairs = blocks.unflatten(-3, (-1, 2))
        first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
        below = A.unflatten(-1, (-1, 2, size)).unflatten(-4, (-1, 2, size))
        below = below[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        joined = blocks.new_zeros(*first.shape[:-2], 2 * size, 2 * size)
        joined[..., :size, :size] = first
        joined[..., size:, size:] = second
        joined[..., size:, :size] = -(second @ below @ first)
        blocks, size = joined, 2 * size
    return blocks.squeeze(-3)
