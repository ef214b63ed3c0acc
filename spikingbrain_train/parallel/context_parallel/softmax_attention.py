"""Softmax attention, full or over a window, over a sequence that may be split over ranks.

The sequence may hold sinks and documents. Sinks see each other and no text. Text sees all sinks and, causally
and within the window, its own document. Across ranks, either the few keys and values that a window reaches
travel (``halo_exchange``), or every rank takes whole sequences of a share of the heads (``ulysses``). Either
way, what is left is the local op.

Shape legend: B batch, T tokens of a slice, H query heads, G groups, K key dim, V value dim; S keys that a
slice sees.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from spikingbrain_train.architecture.sequence_layout import DocumentBounds, SequenceLayout
from spikingbrain_train.config.parallel import SlidingWindowContextParallel
from spikingbrain_train.ops.softmax_attention import bidirectional_attention, softmax_attention
from spikingbrain_train.parallel.context_parallel.arguments import checked_group
from spikingbrain_train.parallel.context_parallel.communication import broadcast_from_first_rank
from spikingbrain_train.parallel.context_parallel.halo_exchange import halo_exchange
from spikingbrain_train.parallel.context_parallel.ulysses import to_slices, to_whole_sequences

_RowDocuments = tuple[DocumentBounds, DocumentBounds]
"""Bounds of a row's documents among its queries and among its text keys, as in flash-attn's varlen calls."""


_USES_HALO: dict[SlidingWindowContextParallel | None, bool] = {
    SlidingWindowContextParallel.halo: True,
    SlidingWindowContextParallel.ulysses: False,
    None: False,
}


def context_parallel_softmax_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    *,
    window: int | None,
    layout: SequenceLayout | None,
    cp_group: torch.distributed.ProcessGroup | None,
    method: SlidingWindowContextParallel | None,
    scale: float,
    backend: str,
) -> Tensor:
    """Attend from a slice of a sequence as if the whole sequence were here.

    Source: SpikingBrain, arXiv 2509.05276, eq. 1-2.

    Args:
        q_BTHK: rotated queries of this rank's slice, sinks first: T is ``layout.slice_length``.
        k_BTGK: rotated keys in q's dtype; H is a multiple of G.
        v_BTGV: values in q's dtype.
        window: text keys that a query sees, its own included; None is full attention.
        layout: sinks, documents and slices; None is one document on one rank.
        cp_group: context-parallel ranks in the order of their slices; None or one rank communicates nothing.
        method: communication of windows; full attention always uses Ulysses.
        scale: factor of the scores.
        backend: of :func:`softmax_attention`.

    Returns:
        o [B, T, H, V] in q's dtype; zeros where sinks are padding.

    Raises:
        ValueError: tensors, layout and group do not fit each other.
    """
    group = checked_group(q_BTHK, layout, cp_group)
    attend = partial(softmax_attention, window=window, scale=scale, backend=backend)
    if layout is None:
        return attend(q_BTHK, k_BTGK, v_BTGV)
    if group is None:
        return _attend_whole(q_BTHK, k_BTGK, v_BTGV, layout, attend, scale)
    if window is not None and _USES_HALO[method]:
        return _attend_with_halo(q_BTHK, k_BTGK, v_BTGV, window, layout, group, attend, scale)
    q, (k, v) = to_whole_sequences(q_BTHK, (k_BTGK, v_BTGV), group)
    return to_slices(_attend_whole(q, k, v, layout, attend, scale), q_BTHK.shape[2], group)


def _attend_whole(
    q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, attend: partial[Tensor], scale: float
) -> Tensor:
    """Whole sequences: sinks, then all of the text."""
    documents = None
    if layout.cu_seqlens is not None:
        documents = [(bounds, bounds) for bounds in layout.cu_seqlens]
    N = layout.num_sink_tokens
    visible_k, visible_v = (x[:, N:] if layout.sinks_are_padding else x for x in (k, v))
    return _attend_sinks_and_text(
        q, (k[:, :N], v[:, :N]), (visible_k, visible_v), N, documents, layout, attend, scale
    )


def _attend_with_halo(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    layout: SequenceLayout,
    group: torch.distributed.ProcessGroup,
    attend: partial[Tensor],
    scale: float,
) -> Tensor:
    """A slice, the text before it that its windows reach, and the first rank's sinks."""
    own_sinks, dims = layout.local_sink_tokens, [k.shape[3], v.shape[3]]
    # Keys and values travel together: one message, and one order of messages on all ranks, backward too.
    kv = torch.cat((k, v), dim=3)
    kv_sinks, kv_text = kv.split([own_sinks, kv.shape[1] - own_sinks], dim=1)
    kv_halo = halo_exchange(kv_text, layout=layout, window=window, group=group)
    unseen = layout.num_text_keys(window) - (kv_text.shape[1] + kv_halo.shape[1])
    visible = [F.pad(kv_halo, (0, 0, 0, 0, unseen, 0)), kv_text]
    if layout.num_sink_tokens and not layout.sinks_are_padding:
        # Elsewhere text stands in for the sinks: a part of the graph, so that all ranks meet in the backward.
        sinks_or_text = kv[:, : layout.num_sink_tokens]
        visible.insert(0, broadcast_from_first_rank(sinks_or_text, group))
    visible_k, visible_v = torch.cat(visible, dim=1).split(dims, dim=3)
    k_sinks, v_sinks = kv_sinks.split(dims, dim=3)
    documents = None
    if layout.cu_seqlens is not None:
        documents = [_documents_with_halo(layout, row, window) for row in range(q.shape[0])]
    return _attend_sinks_and_text(
        q, (k_sinks, v_sinks), (visible_k, visible_v), own_sinks, documents, layout, attend, scale
    )


def _documents_with_halo(layout: SequenceLayout, row: int, window: int) -> _RowDocuments:
    """The documents of a slice, the first with what its windows reach on earlier ranks.

    What they do not reach there is a document without queries in front of it.
    """
    documents = layout.local_documents(row)
    seen_before = min(window - 1, documents[0].before)
    unseen = min(window - 1, layout.text_range().start) - seen_before
    queries, keys = [0], [0]
    if unseen:
        queries, keys = [0, 0], [0, unseen]
    for document in documents:
        queries.append(queries[-1] + document.length)
        keys.append(keys[-1] + document.length + seen_before)
        seen_before = 0
    return tuple(queries), tuple(keys)


def _attend_sinks_and_text(
    q_BTHK: Tensor,
    sinks: tuple[Tensor, Tensor],
    visible: tuple[Tensor, Tensor],
    own_sinks: int,
    documents: list[_RowDocuments] | None,
    layout: SequenceLayout,
    attend: partial[Tensor],
    scale: float,
) -> Tensor:
    """Output of a slice that begins with ``own_sinks`` sinks.

    Args:
        q_BTHK: queries of sinks and text.
        sinks: keys and values [B, own_sinks, G, *] that the sinks see.
        visible: keys and values [B, S, G, *] that the text sees: sinks unless they are padding, then text.
        documents: of every row.
    """
    q_sinks, q_text = q_BTHK.split([own_sinks, q_BTHK.shape[1] - own_sinks], dim=1)
    attend = partial(attend, num_sink_tokens=0 if layout.sinks_are_padding else layout.num_sink_tokens)
    if documents is None or all(len(queries) == 2 for queries, _ in documents):
        o_text = attend(q_text, *visible)
    else:
        rows = zip(q_text.split(1), *(x.split(1) for x in visible), documents, strict=True)
        o_text = torch.cat([attend(q, k, v, cu_seqlens_q=d[0], cu_seqlens_k=d[1]) for q, k, v, d in rows])
    if own_sinks == 0:
        return o_text
    if layout.sinks_are_padding:
        return F.pad(o_text, (0, 0, 0, 0, own_sinks, 0))
    return torch.cat((bidirectional_attention(q_sinks, *sinks, scale=scale), o_text), dim=1)
