"""A short causal convolution over a sequence that may hold sinks and documents and may be split over ranks.

A document's first tokens see nothing before it, nor does text see sinks, which are convolved by themselves:
what a convolution carries are a few neighbours, what sinks carry is for all text.

Shape legend: B batch, T local time, D channels, W width of the kernel.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.ops.causal_convolution import causal_convolution
from spikingbrain_train.parallel.context_parallel.arguments import checked_group
from spikingbrain_train.parallel.context_parallel.halo_exchange import halo_exchange


def context_parallel_convolution(
    x_BTD: Tensor,
    weight_DW: Tensor,
    *,
    layout: SequenceLayout | None,
    cp_group: torch.distributed.ProcessGroup | None,
) -> Tensor:
    """Convolve a slice of a sequence as if the whole sequence were here.

    Args:
        x_BTD: this rank's slice, sinks first: T is ``layout.slice_length``.
        weight_DW: kernels in x's dtype; the last tap multiplies the token itself.
        layout: sinks, documents and slices; None is one document a row on one rank.
        cp_group: context-parallel ranks in the order of their slices; None or one rank communicates nothing.

    Returns:
        [B, T, D].

    Raises:
        ValueError: tensors, layout and group do not fit each other.
    """
    group = checked_group(x_BTD, layout, cp_group)
    if layout is None:
        return causal_convolution(x_BTD, weight_DW)[0]
    B, T, D = x_BTD.shape
    before, sinks = weight_DW.shape[1] - 1, layout.local_sink_tokens
    continued_BSD = None
    if group is not None:
        text = x_BTD[:, sinks:].unsqueeze(2)
        halo = halo_exchange(text, layout=layout, window=before + 1, group=group).squeeze(2)
        # Every rank's output depends on what it got, be it nothing: the others wait for its gradient.
        continued_BSD = F.pad(halo, (0, 0, before - halo.shape[1], 0))
    nothing_1SD = x_BTD.new_zeros(1, before, D)
    lengths, states = [], []
    for row in range(B):
        if sinks:
            lengths.append(sinks)
            states.append(nothing_1SD)
        for document in layout.local_documents(row):
            state = nothing_1SD
            if continued_BSD is not None and document.start == layout.text_range().start:
                seen = torch.arange(before, 0, -1, device=x_BTD.device) <= document.before
                state = continued_BSD[row : row + 1] * seen[:, None].to(x_BTD.dtype)
            lengths.append(document.length)
            states.append(state)
    y, _ = causal_convolution(
        x_BTD.reshape(1, B * T, D),
        weight_DW,
        initial_state=torch.cat(states),
        cu_seqlens=[0, *accumulate(lengths)],
    )
    return y.view(B, T, D)
