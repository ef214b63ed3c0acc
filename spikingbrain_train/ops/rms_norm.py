"""Root-mean-square norm (Zhang & Sennrich, arXiv 1910.07467): ``x / sqrt(mean(x^2) + eps) * weight``.

torch has fused kernels for GPUs. On CPU it runs some dozen elementary operations over the whole tensor, most
of them in the backward pass; the form here works in cache, needs less than half the time, and keeps only the
input and one number a row. Rows that tensor-parallel ranks share out need one number a row of each other, in
the forward and in the backward pass.

Shape letters: N rows (all leading dimensions), D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


def rms_norm(x: Tensor, weight: Tensor, eps: float, group: ProcessGroup | None = None) -> Tensor:
    """Normalise over the last dimension.

    Args:
        x: [..., D], floating point.
        weight: [D] in x's dtype.
        eps: added to the mean square.
        group: ranks that each have an equal part of every row, D numbers of it, and of the weight; the mean
            is over all of them. None: rows are whole.

    Returns:
        [..., D] in x's dtype; statistics and sums are kept in float32 (float64 for float64 inputs).
        Differentiable once in x and weight.
    """
    if group is not None and group.size() > 1:
        return _SplitRMSNorm.apply(x, weight, eps, group)
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


class _SplitRMSNorm(torch.autograd.Function):
    """Rows of which each rank of a group has a part: the same numbers are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, group: ProcessGroup) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        inverse_rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).square_()
        torch.distributed.all_reduce(inverse_rms, group=group)
        inverse_rms.div_(x.shape[-1] * group.size()).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.group = group
        return (x.to(dtype) * inverse_rms).mul_(weight.to(dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        dtype = inverse_rms.dtype
        normed, grad = x.to(dtype) * inverse_rms, grad_output.to(dtype)
        products = grad * normed
        grad_weight = products.flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight.to(dtype)
        # As above, of whole rows.
        along = products.matmul(weight.to(dtype)).unsqueeze(-1)
        torch.distributed.all_reduce(along, group=ctx.group)
        along.div_(-x.shape[-1] * ctx.group.size())
        return grad.addcmul_(normed, along).mul_(inverse_rms).to(x.dtype), grad_weight, None, None
