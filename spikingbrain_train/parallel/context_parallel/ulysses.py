"""Ulysses: an all-to-all turns a slice of all heads into the whole sequence of a share of them, and back.

Which heads and groups those are: ``head_shares``. What has one dtype travels in one message, token by token,
so what the ranks send lies in memory as the whole sequence, and is not copied again.

Shape legend: B batch, T tokens of a slice, S = P * T tokens of the sequence, H heads, G groups, K key dim, V
value dim; h heads and g groups of one rank's share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spikingbrain_train.architecture.head_shares import head_shares
from spikingbrain_train.parallel.context_parallel.all_to_all import all_to_all


def to_whole_sequences(
    q_BTHK: Tensor, of_groups: Sequence[Tensor], group: torch.distributed.ProcessGroup
) -> tuple[Tensor, list[Tensor]]:
    """The whole sequences of this rank's share of the heads.

    Args:
        q_BTHK: queries of this rank's slice, all heads.
        of_groups: what heads share, [B, T, G, any] each: keys, values, and gates of linear attention. H is a
            multiple of G. What has q's dtype travels in one message with q, and every other dtype in one of
            its own, so that float32 gates stay float32.
        group: ranks in the order of their slices, all of the same length.

    Returns:
        q [B, S, h, K] and each of ``of_groups`` as [B, S, g, any]; h is a multiple of g and head i reads
        group ``i // (h // g)``. Where a share has not the same number of heads of every group, groups are
        repeated here, after the transport, until that holds.
    """
    B, T, H, _ = q_BTHK.shape
    shares = head_shares(H, of_groups[0].shape[2], group.size())
    mine = shares[group.rank()]
    tensors = [q_BTHK, *of_groups]
    parts = [[[x] for x in q_BTHK.split([len(share.heads) for share in shares], dim=2)]]
    for x in of_groups:
        # Split once into groups, of which several ranks may get the same: gradients are then added by group.
        groups = x.split(1, dim=2)
        parts.append([[groups[i] for i in share.groups] or [x[:, :, :0]] for share in shares])
    widths = [len(mine.heads if x is q_BTHK else mine.groups) * x.shape[3] for x in tensors]
    received: dict[int, Tensor] = {}
    # All messages leave before anything is made of one: on every rank their gradients then travel back in the
    # same order, whatever the rank's share needs afterwards.
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        members = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        messages = [
            torch.cat([x.flatten(2) for i in members for x in parts[i][rank]], dim=2)
            .transpose(0, 1)
            .flatten()
            for rank in range(group.size())
        ]
        columns = [widths[i] for i in members]
        sizes = [x.numel() for x in messages]
        whole = all_to_all(torch.cat(messages), sizes, [T * B * sum(columns)] * group.size(), group)
        whole_BSx = whole.view(T * group.size(), B, sum(columns)).transpose(0, 1)
        received |= dict(zip(members, whole_BSx.split(columns, dim=2), strict=True))
    q, *shared = (received[i].unflatten(2, (-1, x.shape[3])) for i, x in enumerate(tensors))
    return _evenly_grouped(q, shared, mine.heads_of_groups)


def _evenly_grouped(
    q_BShK: Tensor, of_groups: list[Tensor], heads_of_groups: tuple[int, ...]
) -> tuple[Tensor, list[Tensor]]:
    if not heads_of_groups:
        one_more = (0, 0, 0, 1)
        return F.pad(q_BShK, one_more), [F.pad(x, one_more) for x in of_groups]
    per_group = math.gcd(*heads_of_groups)
    if max(heads_of_groups) > per_group:
        repeats = [count // per_group for count in heads_of_groups]
        of_groups = [_repeated(x, repeats) for x in of_groups]
    return q_BShK, of_groups


def _repeated(x_BSgX: Tensor, repeats: Sequence[int]) -> Tensor:
    """``repeat_interleave`` along the groups, with counts on the host, which need not wait for a GPU."""
    groups = zip(x_BSgX.split(1, dim=2), repeats, strict=True)
    return torch.cat([x_BS1X.expand(-1, -1, count, -1) for x_BS1X, count in groups], dim=2)


def to_slices(o_BShV: Tensor, num_heads: int, group: torch.distributed.ProcessGroup) -> Tensor:
    """The way back: from the whole sequences of a share of the heads to this rank's slice of all of them.

    Args:
        o_BShV: output for the queries of :func:`to_whole_sequences`.
        num_heads: H, heads of all ranks.
        group: the same ranks.

    Returns:
        o [B, T, H, V].
    """
    B, S, _, V = o_BShV.shape
    T = S // group.size()
    counts = [len(share.heads) for share in head_shares(num_heads, num_heads, group.size())]
    mine = counts[group.rank()]
    messages = o_BShV[:, :, :mine].transpose(0, 1).flatten()
    sizes = [T * B * count * V for count in counts]
    received = all_to_all(messages, [T * B * mine * V] * group.size(), sizes, group)
    parts = [x.view(T, B, count, V) for x, count in zip(received.split(sizes), counts, strict=True)]
    return torch.cat(parts, dim=2).transpose(0, 1)
