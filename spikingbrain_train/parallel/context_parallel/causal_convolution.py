"""The causal convolution over a sequence that may hold sinks and documents and may be split over ranks.

What a document needs before its first token here are the last W - 1 inputs: of its own part on the ranks
before (``halo_exchange`` brings them) and, where that is shorter, of the sinks, if it sees them.

Shape legend: B batch, T local time, D channels, W width of the kernel.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.ops.causal_convolution import causal_convolution
from spikingbrain_train.ops.host_numbers import on_device
from spikingbrain_train.parallel.context_parallel.arguments import checked_group
from spikingbrain_train.parallel.context_parallel.communication import broadcast_from_first_rank
from spikingbrain_train.parallel.context_parallel.halo_exchange import halo_exchange


def context_parallel_causal_convolution(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    *,
    layout: SequenceLayout | None,
    cp_group: torch.distributed.ProcessGroup | None,
    sees_sinks: bool,
) -> Tensor:
    """Convolve a slice of a sequence as if the whole sequence were here.

    Args:
        x_BTD: inputs of this rank's slice, sinks first: T is ``layout.slice_length``.
        weight_DW: kernels in x's dtype; the last tap multiplies the token itself.
        bias_D: or None.
        layout: sinks, documents and slices; None is one document a row on one rank. Where sinks are padding,
            no text sees them.
        cp_group: context-parallel ranks in the order of their slices; None or one rank communicates nothing.
        sees_sinks: text begins behind the last sinks, as behind tokens; else sinks are convolved by
            themselves, and text as if there were none.

    Returns:
        [B, T, D].

    Raises:
        ValueError: tensors, layout and group do not fit each other.
    """
    group = checked_group(x_BTD, layout, cp_group)
    if layout is None:
        return causal_convolution(x_BTD, weight_DW, bias_D)[0]
    before, rows = weight_DW.shape[1] - 1, x_BTD.shape[0]
    sink_inputs = x_BTD.new_zeros(rows, before, x_BTD.shape[2])
    if sees_sinks and layout.num_sink_tokens and not layout.sinks_are_padding:
        sink_inputs = broadcast_from_first_rank(_last_sinks(x_BTD, layout, before), group)
    text = x_BTD.split([layout.local_sink_tokens, x_BTD.shape[1] - layout.local_sink_tokens], dim=1)[1]
    halo = text[:, :0]
    if group is not None:
        halo = halo_exchange(text.unsqueeze(2), layout=layout, window=before + 1, group=group).squeeze(2)
    lengths, index = _segments(layout, rows, before, halo.shape[1])
    # All of both, needed or not: other ranks wait for the gradients of what they sent.
    known = torch.cat((sink_inputs, halo), dim=1).flatten(0, 1)
    known = torch.cat((torch.zeros_like(known[:1]), known))
    states = known.index_select(0, on_device(index, known.device, torch.int64))
    states = states.view(len(lengths), before, x_BTD.shape[2])
    if len(lengths) == rows:
        return causal_convolution(x_BTD, weight_DW, bias_D, initial_state=states)[0]
    y, _ = causal_convolution(
        x_BTD.flatten(0, 1).unsqueeze(0),
        weight_DW,
        bias_D,
        initial_state=states,
        cu_seqlens=[0, *accumulate(lengths)],
    )
    return y.view(x_BTD.shape)


def _last_sinks(x_BTD: Tensor, layout: SequenceLayout, before: int) -> Tensor:
    """The last inputs among the sinks, zeros in front of fewer; elsewhere zeros of that shape.

    Zeros by a product, so that they stay connected to the inputs on every rank.
    """
    sinks = layout.local_sink_tokens
    if not sinks:
        return (x_BTD[:, :1] * 0.0).expand(-1, before, -1)
    padded = torch.cat((x_BTD.new_zeros(x_BTD.shape[0], before, x_BTD.shape[2]), x_BTD[:, :sinks]), dim=1)
    return padded[:, padded.shape[1] - before :]


def _segments(layout: SequenceLayout, rows: int, before: int, halo: int) -> tuple[list[int], list[int]]:
    """Lengths of all segments of the slice, and where the inputs before each lie, tap by tap.

    Rows of a list: a row of zeros, then of every sequence ``before`` of the sinks and ``halo`` of the ranks
    before.
    """
    lengths, index = [], []
    for row in range(rows):
        if layout.local_sink_tokens:
            lengths.append(layout.local_sink_tokens)
            index += [0] * before
        first = 1 + row * (before + halo)
        for document in layout.local_documents(row):
            own = min(document.before, before)
            lengths.append(document.length)
            index += [first + tap for tap in range(own, before)]
            index += [first + before + halo - own + tap for tap in range(own)]
    return lengths, index
