"""Sliding windows across ranks: every rank gets the text just before its slice from the ranks that hold it.

How much that is follows from the layout alone, so every rank knows what it sends and receives. A window may
reach over several ranks; a rank whose first document begins with its slice gets nothing. What travels does
not grow with the sequence.

Shape legend: B batch, T text tokens of this rank's slice, n tokens before it, G groups, D dimensions.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.parallel.context_parallel.all_to_all import exchange


@lru_cache(maxsize=64)  # all layers of a micro-batch ask for the same
def halo_lengths(layout: SequenceLayout, window: int) -> tuple[int, ...]:
    """For every rank, the tokens of text before its slice that its queries see.

    Rows have documents of their own: the one where they are most counts.
    """
    rows = 1 if layout.cu_seqlens is None else len(layout.cu_seqlens)
    return tuple(
        max(min(window - 1, layout.local_documents(row, rank)[0].before) for row in range(rows))
        for rank in range(layout.context_parallel_size)
    )


def tokens_sent(layout: SequenceLayout, window: int, source: int, target: int) -> int:
    """The last tokens of ``source`` that ``target`` gets, 0 for ranks at or before ``source``."""
    if target <= source:
        return 0
    held, first = layout.text_range(source), layout.text_range(target).start
    return max(0, held.stop - max(held.start, first - halo_lengths(layout, window)[target]))


class _HaloExchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layout: SequenceLayout, window: int, group: torch.distributed.ProcessGroup
    ) -> Tensor:
        rank, ranks = layout.context_parallel_rank, range(layout.context_parallel_size)
        ctx.sent = [tokens_sent(layout, window, rank, target) for target in ranks]
        ctx.received = [tokens_sent(layout, window, source, rank) for source in ranks]
        ctx.group, ctx.shape = group, x.shape
        messages = [x[:, x.shape[1] - tokens :] for tokens in ctx.sent]
        received = _exchange(messages, ctx.sent, ctx.received, x, group)
        return torch.cat(received, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        messages = grad.split(ctx.received, dim=1)
        grad_x = grad.new_zeros(ctx.shape)
        received = _exchange(messages, ctx.received, ctx.sent, grad, ctx.group)
        for tokens, message in zip(ctx.sent, received, strict=True):
            grad_x[:, ctx.shape[1] - tokens :] += message
        return grad_x, None, None, None


def _exchange(
    messages: Any, send: list[int], receive: list[int], like: Tensor, group: torch.distributed.ProcessGroup
) -> list[Tensor]:
    """One message [B, tokens, G, D] to and from every rank."""
    B, _, G, D = like.shape
    flat = torch.cat([message.flatten() for message in messages])
    elements_sent = [B * tokens * G * D for tokens in send]
    elements_received = [B * tokens * G * D for tokens in receive]
    received = exchange(flat, elements_sent, elements_received, group).split(elements_received)
    return [x.view(B, tokens, G, D) for x, tokens in zip(received, receive, strict=True)]


def halo_exchange(
    x_BTGD: Tensor, *, layout: SequenceLayout, window: int, group: torch.distributed.ProcessGroup
) -> Tensor:
    """Text of the ranks before, as far as this rank's queries see it through the window and their documents.

    Every rank of the group must call this, and every rank's loss must depend on the result: gradients travel
    back to where the text came from and are added there.

    Args:
        x_BTGD: what is needed of every token of text of this rank's slice (keys and values), sinks left out.
        layout: of this rank; the same on the other ranks but for its own rank.
        window: text keys that a query sees, its own included.
        group: context-parallel ranks in the order of their slices.

    Returns:
        [B, n, G, D], the n tokens before the slice; n is ``halo_lengths(layout, window)[rank]``. Rows that
        need fewer of them get them all.
    """
    if not any(halo_lengths(layout, window)):  # the same on every rank
        return x_BTGD[:, :0]
    return _HaloExchange.apply(x_BTGD, layout, window, group)
