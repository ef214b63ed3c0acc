"""All-to-all of flat messages whose lengths differ from rank to rank, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def exchange(
    messages: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: torch.distributed.ProcessGroup,
) -> Tensor:
    """Send each rank of the group its part of ``messages`` and return what the ranks sent, end to end.

    Every rank must call this, also one that has nothing to send or receive. Not differentiable.

    Args:
        messages: [sum(send)], contiguous; the message to the first rank comes first.
        send: elements for every rank.
        receive: elements that every rank sends here.

    Returns:
        [sum(receive)] in the dtype of messages, in the order of the ranks.
    """
    received = messages.new_empty(sum(receive))
    torch.distributed.all_to_all_single(received, messages, list(receive), list(send), group=group)
    return received


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        messages: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        group: torch.distributed.ProcessGroup,
    ) -> Tensor:
        ctx.settings = (receive, send, group)
        return exchange(messages, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange(grad.contiguous(), *ctx.settings), None, None, None


def all_to_all(
    messages: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: torch.distributed.ProcessGroup,
) -> Tensor:
    """:func:`exchange`, differentiable: gradients travel back the same way.

    Every rank's loss must depend on the result, else the others wait for it in the backward pass.
    """
    if torch.is_grad_enabled() and not messages.requires_grad:
        # The ranks need not agree on whether messages have a gradient; all of them must exchange it.
        messages = messages.detach().requires_grad_()
    return _AllToAll.apply(messages, tuple(send), tuple(receive), group)
