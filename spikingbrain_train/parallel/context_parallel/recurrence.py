"""A recurrence over a sequence that may hold sinks and documents and may be split over ranks.

A slice is a list of segments, each with the state it begins with: zeros, the state after the sinks (a
document that begins here), or the state that the rank before hands over (a document that goes on).
Communication is in ``state_passing``, or in ``ulysses``, which makes whole sequences of slices; here is what
goes in and what is made of it. What is computed says a :class:`Recurrence`.

Shape legend: B batch, T local time, H query heads, G key/value groups, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import accumulate

import torch
from torch import Tensor

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.parallel import LinearAttentionContextParallel
from spikingbrain_train.ops.host_numbers import on_device
from spikingbrain_train.parallel.context_parallel.arguments import checked_group
from spikingbrain_train.parallel.context_parallel.communication import broadcast_from_first_rank
from spikingbrain_train.parallel.context_parallel.state_passing import advance, start_state_passing
from spikingbrain_train.parallel.context_parallel.ulysses import to_slices, to_whole_sequences


@dataclass(frozen=True)
class Recurrence:
    """What maps a state [B, G, K, V] through tokens, linearly: ``S_out = A S_in + S_local``.

    ``inputs`` are what is there of every group, [B, T, G, any] each: keys, values, gates.
    """

    outputs: Callable[[Tensor, Sequence[Tensor], Tensor | None, Sequence[int] | None], Tensor]
    """Of q [B, T, H, K], inputs, the state before and ``cu_seqlens``: o [B, T, H, V].

    With ``cu_seqlens`` B is 1 and states are one a document; None is a state of zeros."""
    end_state: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]
    """Of inputs: S_local [B, G, K, V], and the transition A, as ``state_passing`` has it."""
    reading: Callable[[Tensor, Sequence[Tensor], Tensor], Tensor] | None = None
    """Of q, inputs and a state: what that state before the tokens adds to their outputs [B, T, H, V].

    None where that costs as much as the outputs: ``allscan`` then waits for the state first."""


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


def context_parallel_recurrence(
    recurrence: Recurrence,
    q_BTHK: Tensor,
    inputs: Sequence[Tensor],
    *,
    layout: SequenceLayout | None,
    cp_group: torch.distributed.ProcessGroup | None,
    method: LinearAttentionContextParallel,
) -> Tensor:
    """Mix a slice of a sequence as if the whole sequence were here.

    Sinks are an ordinary recurrence from a zero state. Without documents the text goes on from there; with
    documents each starts from the state after the sinks. With several ranks ``ulysses`` runs whole sequences
    of a share of the heads. For the other methods the first step is the cheap end state of the slice. Then
    ``allgather`` waits for the states before the slice and runs the slice from there, while ``allscan`` runs
    the slice from zeros meanwhile and adds the output of the state before it.

    Args:
        recurrence: what is computed.
        q_BTHK: queries of this rank's slice, sinks first: T is ``layout.slice_length``.
        inputs: of the recurrence, [B, T, G, any] each.
        layout: sinks, documents and slices; None is one document on one rank.
        cp_group: context-parallel ranks in the order of their slices; None or one rank communicates nothing.
        method: communication.

    Returns:
        o [B, T, H, V] in q's dtype; zeros where sinks are padding.

    Raises:
        ValueError: tensors, layout and group do not fit each other.
    """
    group = checked_group(q_BTHK, layout, cp_group)
    if group is not None and layout is not None and method is LinearAttentionContextParallel.ulysses:
        q, whole_inputs = to_whole_sequences(q_BTHK, inputs, group)
        o_BShV = context_parallel_recurrence(
            recurrence,
            q,
            whole_inputs,
            layout=replace(layout, context_parallel_rank=0, context_parallel_size=1),
            cp_group=None,
            method=method,
        )
        return to_slices(o_BShV, q_BTHK.shape[2], group)
    rows = [_segments(layout, row, q_BTHK.shape[1]) for row in range(q_BTHK.shape[0])]
    sink_state = None
    if layout is not None and layout.cu_seqlens is not None and _sinks_are_seen(layout):
        sink_state = broadcast_from_first_rank(_state_after_sinks(recurrence, inputs, layout), group)
    if group is None:
        o = _run_slice(recurrence, q_BTHK, inputs, rows, sink_state, None)
    else:
        passing = start_state_passing(*_end_states(recurrence, inputs, rows, sink_state), group, method)
        overlap = method is LinearAttentionContextParallel.allscan and recurrence.reading is not None
        state_in = None if overlap else passing.wait()
        o = _run_slice(recurrence, q_BTHK, inputs, rows, sink_state, state_in)
        if overlap:
            o = _add_previous(recurrence, o, q_BTHK, inputs, rows, passing.wait())
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


def _state_after_sinks(recurrence: Recurrence, inputs: Sequence[Tensor], layout: SequenceLayout) -> Tensor:
    """[B, G, K, V] on the rank that holds the sinks; elsewhere zeros of that shape.

    Zeros by a product, of one token: they stay connected to the inputs, so that the backward pass reaches the
    broadcast on every rank, even one that asks for the gradients of the inputs alone.
    """
    length = max(1, layout.local_sink_tokens)
    tokens = [length, inputs[0].shape[1] - length]
    state, _ = recurrence.end_state([x.split(tokens, dim=1)[0] for x in inputs])
    return state if layout.local_sink_tokens else state * 0.0


def _end_states(
    recurrence: Recurrence,
    inputs: Sequence[Tensor],
    rows: list[list[_Segment]],
    sink_state_BGKV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What this rank sends: the state after its slice, and what the slice makes of the state before it."""
    states, transitions = [], []
    T = inputs[0].shape[1]
    of_rows = zip(*(x.split(1) for x in inputs), strict=True)
    for row, (segments, tensors) in enumerate(zip(rows, of_rows, strict=True)):
        last = segments[-1]
        tail = [x.split([T - last.length, last.length], dim=1)[1] for x in tensors]
        state, transition = recurrence.end_state(tail)
        if sink_state_BGKV is not None:
            # Also where it is zero: the gradients of states then arrive before those of the sinks on every
            # rank, and all ranks communicate in the same order.
            of_sinks = transition * float(last.start is _Start.after_sinks)
            state = advance(of_sinks, sink_state_BGKV[row : row + 1], state)
        states.append(state)
        transitions.append(transition * float(last.start is _Start.previous_rank))
    return torch.cat(states), torch.cat(transitions)


def _run_slice(
    recurrence: Recurrence,
    q_BTHK: Tensor,
    inputs: Sequence[Tensor],
    rows: list[list[_Segment]],
    sink_state_BGKV: Tensor | None,
    state_in_BGKV: Tensor | None,
) -> Tensor:
    """The op over all segments: rows of one segment as a batch, else documents of one flat sequence."""
    initial_state = _initial_states(rows, sink_state_BGKV, state_in_BGKV)
    if all(len(segments) == 1 for segments in rows):
        return recurrence.outputs(q_BTHK, inputs, initial_state, None)
    lengths = [segment.length for segments in rows for segment in segments]
    q, *flat = (x.flatten(0, 1).unsqueeze(0) for x in (q_BTHK, *inputs))
    o = recurrence.outputs(q, flat, initial_state, [0, *accumulate(lengths)])
    return o.view(*q_BTHK.shape[:3], o.shape[-1])


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
    return torch.cat((zero, *states.values())).index_select(0, on_device(index, zero.device, torch.int64))


def _add_previous(
    recurrence: Recurrence,
    o_BTHV: Tensor,
    q_BTHK: Tensor,
    inputs: Sequence[Tensor],
    rows: list[list[_Segment]],
    state_in_BGKV: Tensor,
) -> Tensor:
    """Add what the state before the slice contributes, up to the first document that begins in the slice."""
    assert recurrence.reading is not None
    continued = [row[0].length if row[0].start is _Start.previous_rank else 0 for row in rows]
    reach = max(continued)
    split = [reach, o_BTHV.shape[1] - reach]
    q, o, *reached = (x.split(split, dim=1)[0] for x in (q_BTHK, o_BTHV, *inputs))
    previous = recurrence.reading(q, reached, state_in_BGKV)
    if min(continued) < reach:
        beyond = torch.arange(reach) >= torch.tensor(continued).unsqueeze(1)
        previous = previous.masked_fill(on_device(beyond, previous.device, torch.bool)[..., None, None], 0.0)
    o = o + previous
    return o if split[1] == 0 else torch.cat((o, o_BTHV.split(split, dim=1)[1]), dim=1)
