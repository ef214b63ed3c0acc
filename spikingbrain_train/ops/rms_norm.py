"""Root-mean-square norm (Zhang & Sennrich, arXiv 1910.07467): ``x / sqrt(mean(x^2) + eps) * weight``.

torch has fused kernels for GPUs. On CPU it runs some dozen elementary operations over the whole tensor, most
of them in the backward pass; the form here works in cache, needs less than half the time, and keeps only the
input and one number a row.

Shape letters: N rows (all leading dimensions), D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise over the last dimension.

    Args:
        x: [..., D], floating point.
        weight: [D] in x's dtype.
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype; statistics and sums are kept in float32 (float64 for float64 inputs).
        Differentiable once in x and weight.
    """
    if x.device.type == "cpu":
        return _RMSNorm.apply(x, weight, eps)
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


# Elements of the rows that are normalised at a time: their temporaries stay in a core's cache, and in memory
# that the allocator reuses instead of asking the kernel for new pages.
_BLOCK_ELEMENTS = 1 << 18


def _blocks(x_ND: Tensor) -> Iterator[slice]:
    N, D = x_ND.shape
    rows = max(1, _BLOCK_ELEMENTS // max(D, 1))
    for start in range(0, N, rows):
        yield slice(start, min(start + rows, N))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x_ND, weight_D = x.reshape(-1, x.shape[-1]), weight.to(dtype)
        y_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        inverse_rms = torch.empty(len(x_ND), 1, dtype=dtype, device=x.device)
        for rows in _blocks(x_ND):
            block, inverse = x_ND[rows].to(dtype), inverse_rms[rows]
            torch.linalg.vector_norm(block, dim=1, keepdim=True, out=inverse)
            inverse.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            y_ND[rows] = (block * inverse).mul_(weight_D)
        ctx.save_for_backward(x, weight, inverse_rms)
        return y_ND.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        D, dtype = x.shape[-1], inverse_rms.dtype
        x_ND, grad_ND, weight_D = x.reshape(-1, D), grad_output.reshape(-1, D), weight.to(dtype)
        grad_x_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        grad_weight = torch.zeros_like(weight_D)
        for rows in _blocks(x_ND):
            inverse = inverse_rms[rows]
            normed, grad = x_ND[rows].to(dtype) * inverse, grad_ND[rows].to(dtype)
            products = grad * normed
            grad_weight += products.sum(0)
            # How far each row's gradient points along the row: the part that normalisation takes out.
            along = torch.mv(products, weight_D).div_(-D).unsqueeze(1)
            grad_x_ND[rows] = (grad * weight_D).addcmul_(normed, along).mul_(inverse)
        return grad_x_ND.view(x.shape), grad_weight.to(weight.dtype), None
