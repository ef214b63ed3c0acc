"""Gated linear attention over a sequence that may hold sinks and documents and may be split over ranks.

A slice is a list of segments, each with the state it begins with: zeros, the state after the sinks (a
document that begins here), or the state that the rank before hands over (a document that goes on).
Communication is in ``state_passing``, or in ``ulysses``, which makes whole sequences of slices; here is what
goes in and what is made of it.

Shape legend: B batch, T local time, H query heads, G key/value groups, K key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from itertools import accumulate

import torch
from torch import Tensor

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.parallel import LinearAttentionContextParallel
from spikingbrain_train.ops.gated_linear_attention import (
    gated_linear_attention,
    gated_linear_attention_end_state,
)
from spikingbrain_train.ops.ordered_sums import cumulative_sum
from spikingbrain_train.parallel.context_parallel.arguments import checked_group
from spikingbrain_train.parallel.context_parallel.communication import broadcast_from_first_rank
from spikingbrain_train.parallel.context_parallel.state_passing import start_state_passing
from spikingbrain_train.parallel.context_parallel.ulysses import to_slices, to_whole_sequences


class _Start(Enum):
    """The state that a segment begins with."""

    zero = "zero"
    after_sinks = "after_sinks"
    previous_rank = "previous_rank"


@dataclass(frozen=True)
class _Segment:
    """Consecutive tokens of a slice that share a state."""

    length: int
    start: _Start


def context_parallel_linear_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_gate_BTGK: Tensor,
    *,
    layout: SequenceLayout | None,
    cp_group: torch.distributed.ProcessGroup | None,
    method: LinearAttentionContextParallel,
    scale: float,
    backend: str,
) -> Tensor:
    """Mix a slice of a sequence as if the whole sequence were here.

    Source: SpikingBrain, arXiv 2509.05276, eq. 10-11.

    Sinks are an ordinary recurrence from a zero state. Without documents the text goes on from there; with
    documents each starts from the state after the sinks. With several ranks ``ulysses`` runs whole sequences
    of a share of the heads. For the other methods the first step is the cheap end state of the slice. Then
    ``allgather`` waits for the states before the slice and runs the slice from there, while ``allscan`` runs
    the slice from zeros meanwhile and adds the output of the state before it.

    Args:
        q_BTHK: queries of this rank's slice, sinks first: T is ``layout.slice_length``.
        k_BTGK: keys in q's dtype.
        v_BTGV: values in q's dtype.
        log_gate_BTGK: natural logarithm of the forget gate, in [-inf, 0], float32 recommended.
        layout: sinks, documents and slices; None is one document on one rank.
        cp_group: context-parallel ranks in the order of their slices; None or one rank communicates nothing.
        method: communication.
        scale: factor of the output.
        backend: of :func:`gated_linear_attention`.

    Returns:
        o [B, T, H, V] in q's dtype; zeros where sinks are padding.

    Raises:
        ValueError: tensors, layout and group do not fit each other.
    """
    group = checked_group(q_BTHK, layout, cp_group)
    if group is not None and layout is not None and method is LinearAttentionContextParallel.ulysses:
        q, (k, v, log_gate) = to_whole_sequences(q_BTHK, (k_BTGK, v_BTGV, log_gate_BTGK), group)
        o_BShV = context_parallel_linear_attention(
            q,
            k,
            v,
            log_gate,
            layout=replace(layout, context_parallel_rank=0, context_parallel_size=1),
            cp_group=None,
            method=method,
            scale=scale,
            backend=backend,
        )
        return to_slices(o_BShV, q_BTHK.shape[2], group)
    rows = [_segments(layout, row, q_BTHK.shape[1]) for row in range(q_BTHK.shape[0])]
    sink_state = None
    if layout is not None and layout.cu_seqlens is not None and _sinks_are_seen(layout):
        sink_state = broadcast_from_first_rank(
            _state_after_sinks(k_BTGK, v_BTGV, log_gate_BTGK, layout), group
        )
    if group is None:
        o = _run_slice(q_BTHK, k_BTGK, v_BTGV, log_gate_BTGK, rows, sink_state, None, scale, backend)
    else:
        passing = start_state_passing(
            *_end_states(k_BTGK, v_BTGV, log_gate_BTGK, rows, sink_state), group, method
        )
        overlap = method is LinearAttentionContextParallel.allscan
        state_in = None if overlap else passing.wait()
        o = _run_slice(q_BTHK, k_BTGK, v_BTGV, log_gate_BTGK, rows, sink_state, state_in, scale, backend)
        if overlap:
            o = _add_previous(o, q_BTHK, log_gate_BTGK, rows, passing.wait(), scale)
    if layout is not None and layout.sinks_are_padding and layout.local_sink_tokens:
        text = o[:, layout.local_sink_tokens :]
        o = torch.cat((torch.zeros_like(o[:, : layout.local_sink_tokens]), text), dim=1)
    return o


def _sinks_are_seen(layout: SequenceLayout) -> bool:
    return layout.num_sink_tokens > 0 and not layout.sinks_are_padding


def _segments(layout: SequenceLayout | None, row: int, length: int) -> list[_Segment]:
    """The segments of a row of this rank's slice."""
    if layout is None:
        return [_Segment(length, _Start.zero)]
    if layout.cu_seqlens is None and not layout.sinks_are_padding:
        first = layout.context_parallel_rank == 0
        return [_Segment(length, _Start.zero if first else _Start.previous_rank)]
    begin = _Start.after_sinks if _sinks_are_seen(layout) else _Start.zero
    segments = [
        _Segment(document.length, _Start.previous_rank if document.before else begin)
        for document in layout.local_documents(row)
    ]
    if layout.local_sink_tokens:
        segments.insert(0, _Segment(layout.local_sink_tokens, _Start.zero))
    return segments


def _state_after_sinks(
    k_BTGK: Tensor, v_BTGV: Tensor, log_gate_BTGK: Tensor, layout: SequenceLayout
) -> Tensor:
    """[B, G, K, V] on the rank that holds the sinks; elsewhere zeros of that shape.

    Zeros by a product, of one token: they stay connected to the inputs, so that the backward pass reaches the
    broadcast on every rank, even one that asks for the gradients of the inputs alone.
    """
    length = max(1, layout.local_sink_tokens)
    tokens = [length, k_BTGK.shape[1] - length]
    sinks = (x.split(tokens, dim=1)[0] for x in (k_BTGK, v_BTGV, log_gate_BTGK))
    state, _ = gated_linear_attention_end_state(*sinks)
    return state if layout.local_sink_tokens else state * 0.0


def _end_states(
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_gate_BTGK: Tensor,
    rows: list[list[_Segment]],
    sink_state_BGKV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What this rank sends: the state after its slice, and how much of the state before it that contains."""
    states, decays = [], []
    T = k_BTGK.shape[1]
    inputs = zip(*(x.split(1) for x in (k_BTGK, v_BTGV, log_gate_BTGK)), strict=True)
    for row, (segments, tensors) in enumerate(zip(rows, inputs, strict=True)):
        last = segments[-1]
        tail = (x.split([T - last.length, last.length], dim=1)[1] for x in tensors)
        state, decay = gated_linear_attention_end_state(*tail)
        if sink_state_BGKV is not None:
            # Also where it is zero: the gradients of states then arrive before those of the sinks on every
            # rank, and all ranks communicate in the same order.
            of_sinks = decay * float(last.start is _Start.after_sinks)
            state = torch.addcmul(state, of_sinks.unsqueeze(-1), sink_state_BGKV[row : row + 1])
        states.append(state)
        decays.append(decay * float(last.start is _Start.previous_rank))
    return torch.cat(states), torch.cat(decays)


def _run_slice(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_gate_BTGK: Tensor,
    rows: list[list[_Segment]],
    sink_state_BGKV: Tensor | None,
    state_in_BGKV: Tensor | None,
    scale: float,
    backend: str,
) -> Tensor:
    """The op over all segments: rows of one segment as a batch, else documents of one flat sequence."""
    initial_state = _initial_states(rows, sink_state_BGKV, state_in_BGKV)
    inputs = [q_BTHK, k_BTGK, v_BTGV, log_gate_BTGK]
    cu_seqlens = None
    if any(len(segments) > 1 for segments in rows):
        lengths = [segment.length for segments in rows for segment in segments]
        cu_seqlens = [0, *accumulate(lengths)]
        inputs = [x.flatten(0, 1).unsqueeze(0) for x in inputs]
    o, _ = gated_linear_attention(
        *inputs, scale=scale, initial_state=initial_state, backend=backend, cu_seqlens=cu_seqlens
    )
    return o.view(*q_BTHK.shape[:3], v_BTGV.shape[-1])


def _initial_states(
    rows: list[list[_Segment]], sink_state_BGKV: Tensor | None, state_in_BGKV: Tensor | None
) -> Tensor | None:
    """The state before every segment [segments, G, K, V]; None if all are zero and need no gradient.

    A state that no segment starts from still gets a gradient, of zeros: the other ranks wait for it.
    """
    known = {_Start.after_sinks: sink_state_BGKV, _Start.previous_rank: state_in_BGKV}
    states = {start: state for start, state in known.items() if state is not None}
    if not states:
        return None
    zero = torch.zeros_like(next(iter(states.values()))[:1])
    first = dict(zip(states, range(1, 1 + len(rows) * len(states), len(rows)), strict=True))
    index = [
        first[segment.start] + row if segment.start in first else 0
        for row, segments in enumerate(rows)
        for segment in segments
    ]
    return torch.cat((zero, *states.values())).index_select(0, torch.tensor(index, device=zero.device))


def _add_previous(
    o_BTHV: Tensor,
    q_BTHK: Tensor,
    log_gate_BTGK: Tensor,
    rows: list[list[_Segment]],
    state_in_BGKV: Tensor,
    scale: float,
) -> Tensor:
    """Add what the state before the slice contributes: ``scale * q * exp(sum of log gates) S_in``.

    It does so up to the first document that begins in the slice.
    """
    continued = [row[0].length if row[0].start is _Start.previous_rank else 0 for row in rows]
    reach, (G, V) = max(continued), (state_in_BGKV.shape[1], state_in_BGKV.shape[3])
    split = [reach, o_BTHV.shape[1] - reach]
    q, log_gate, o = (x.split(split, dim=1)[0] for x in (q_BTHK, log_gate_BTGK, o_BTHV))
    decay_BTGK = cumulative_sum(log_gate.to(state_in_BGKV.dtype), 1).exp() * scale
    if min(continued) < reach:
        beyond = torch.arange(reach) >= torch.tensor(continued).unsqueeze(1)
        decay_BTGK = decay_BTGK.masked_fill(beyond.to(decay_BTGK.device)[..., None, None], 0.0)
    q_BTGRK = q.unflatten(2, (G, -1)) * decay_BTGK.to(q.dtype).unsqueeze(3)
    previous = torch.einsum("btgrk,bgkv->btgrv", q_BTGRK, state_in_BGKV.to(q.dtype))
    o = o + previous.reshape(*o.shape[:3], V)
    return o if split[1] == 0 else torch.cat((o, o_BTHV.split(split, dim=1)[1]), dim=1)
