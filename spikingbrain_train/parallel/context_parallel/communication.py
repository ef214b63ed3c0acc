"""Communication that several kinds of mixer share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _BroadcastFromFirstRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        # clone() would keep strides, which the ranks need not share.
        received = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.broadcast(received, torch.distributed.get_global_rank(group, 0), group)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Sums of many ranks' gradients in 16 bits would round once a rank.
        dtype = torch.float32 if grad.dtype in (torch.bfloat16, torch.float16) else grad.dtype
        total = grad.to(dtype, memory_format=torch.contiguous_format, copy=True)
        torch.distributed.reduce(total, torch.distributed.get_global_rank(ctx.group, 0), group=ctx.group)
        if torch.distributed.get_rank(ctx.group):
            return torch.zeros_like(grad), None
        return total.to(grad.dtype), None


def broadcast_from_first_rank(x: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """Give every rank the first rank's tensor; its gradient is the sum of all ranks' gradients.

    Every rank of the group must call this, and every rank's loss must depend on the result (a product with
    zero is enough): otherwise the others wait for it in the backward pass. ``torch.autograd.grad`` skips what
    its inputs do not need, so with it x must depend on them on the other ranks, too.

    Args:
        x: any shape. The first rank's is the data; the other ranks give a tensor of the same shape, dtype and
            device whose values do not matter and whose gradient is zero.
        group: None or a group of one rank returns ``x`` itself.

    Returns:
        The first rank's x. Gradients of 16-bit tensors are summed in float32.
    """
    if group is None or group.size() == 1:
        return x
    if torch.is_grad_enabled() and not x.requires_grad:
        # The ranks need not agree on whether x has a gradient; all of them must enter the reduction.
        x = x.detach().requires_grad_()
    return _BroadcastFromFirstRank.apply(x, group)


def all_slices(x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """The slices of all ranks one behind the other, along the second axis. Not differentiable.

    Args:
        x: [B, T, ...], of the same shape on every rank.
        group: context-parallel ranks in the order of their slices.
    """
    if group.size() == 1:
        return x
    slices = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    torch.distributed.all_gather(slices, x.contiguous(), group=group)
    return torch.cat(slices, dim=1)
