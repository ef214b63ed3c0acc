"""Causal and sliding-window attention by torch's flex attention, compiled for GPUs.

Sinks, windows and documents go into one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from spikingbrain_train.ops.host_numbers import on_device
from spikingbrain_train.ops.softmax_attention.documents import Documents

_BLOCK = 128


@dataclass(frozen=True)
class Visibility:
    """Which keys the queries of one call see."""

    Tq: int
    Tk: int
    """Keys of text."""
    window: int
    num_sink_tokens: int
    documents: Documents | None


@cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _seen_text(visibility: Visibility) -> tuple[Tensor, Tensor]:
    """First and last text key that every query sees, int64 [Tq] each on CPU. Both never fall."""
    query = torch.arange(visibility.Tq)
    if visibility.documents is None:
        last = query + (visibility.Tk - visibility.Tq)
        document_start = torch.zeros_like(last)
    else:
        documents = visibility.documents
        lengths = torch.tensor(documents.query_lengths)
        query_ends = torch.tensor(documents.cu_seqlens_q[1:]).repeat_interleave(lengths)
        key_ends = torch.tensor(documents.cu_seqlens_k[1:]).repeat_interleave(lengths)
        document_start = torch.tensor(documents.cu_seqlens_k[:-1]).repeat_interleave(lengths)
        last = key_ends - query_ends + query
    return torch.maximum(document_start, last - visibility.window + 1), last


@lru_cache(maxsize=8)
def block_mask(visibility: Visibility, device: torch.device) -> Any:
    """The blocks of queries and keys that the kernel computes, made from the layout alone.

    That takes O(T + (T / 128)^2) memory, where flex attention's own ``create_block_mask`` fills a Tq x Tk
    mask. All layers of a micro-batch share it. Every query sees all sinks and one run of text keys, whose
    ends never fall from query to query, so the runs of a block's first and last query say which blocks of
    keys it sees somewhere and everywhere.
    """
    from torch.nn.attention.flex_attention import BlockMask

    N, Tk = visibility.num_sink_tokens, visibility.Tk
    first, last = (on_device(x, device, torch.int64) for x in _seen_text(visibility))
    starts = torch.arange(0, visibility.Tq, _BLOCK, device=device)
    ends = (starts + _BLOCK).clamp(max=visibility.Tq) - 1
    blocks = torch.arange(0, N + Tk, _BLOCK, device=device)
    block_ends = blocks + _BLOCK - 1

    seen_first, seen_last = N + first[starts][:, None], N + last[ends][:, None]
    somewhere = (blocks < N) | ((blocks <= seen_last) & (block_ends >= seen_first))
    # Text that all queries of a block see lies between the last one's first key and the first one's last key.
    # A block of keys may begin among the sinks if they and that text touch.
    common_first, common_last = N + first[ends][:, None], N + last[starts][:, None]
    everywhere = (block_ends < N) | (
        (block_ends <= common_last) & ((blocks >= common_first) | (common_first == N))
    )

    if visibility.documents is None:
        offset, window = Tk - visibility.Tq, visibility.window

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            distance = query + offset - (key - N)
            return (key < N) | ((distance >= 0) & (distance < window))
    else:

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key < N) | ((key - N <= last[query]) & (key - N >= first[query]))

    return BlockMask.from_kv_blocks(
        *_ordered(somewhere & ~everywhere),
        *_ordered(everywhere),
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(visibility.Tq, N + Tk),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number of true blocks of every row, and their indices before those of the others.

    Returns:
        int32 [1, 1, rows] and int32 [1, 1, rows, columns].
    """
    blocks = blocks.to(torch.int32)[None, None]
    order = blocks.argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


def flex_softmax_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    *,
    window: int | None,
    scale: float,
    num_sink_tokens: int = 0,
    documents: Documents | None = None,
) -> Tensor:
    """Output [B, Tq, H, V] in q's dtype; torch compiles the kernel for each new shape."""
    Tq, heads_per_group = q_BTHK.shape[1], q_BTHK.shape[2] // k_BTGK.shape[2]
    Tk = k_BTGK.shape[1] - num_sink_tokens
    visibility = Visibility(Tq, Tk, Tk if window is None else min(window, Tk), num_sink_tokens, documents)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGV))
    o = _compiled_flex_attention()(
        q,
        k,
        v,
        block_mask=block_mask(visibility, q.device),
        scale=scale,
        enable_gqa=heads_per_group > 1,
    )
    return o.transpose(1, 2)
