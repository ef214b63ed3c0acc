"""The selective scan over a sequence that may hold sinks and documents and may be split over ranks.

With several ranks every one first scans the end of its slice from zero: the state behind it and the decay
over it are what the states before all slices are made of. Then the slice is scanned from there. What travels
is D x N numbers a sequence, whatever its length.

Shape legend: B batch, T local time, D channels, N state size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.parallel import LinearAttentionContextParallel
from spikingbrain_train.ops.selective_scan import selective_scan
from spikingbrain_train.parallel.context_parallel.recurrence import Recurrence, context_parallel_recurrence


def context_parallel_selective_scan(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_D: Tensor,
    *,
    layout: SequenceLayout | None,
    cp_group: torch.distributed.ProcessGroup | None,
    backend: str,
) -> Tensor:
    """Mix a slice of a sequence as if the whole sequence were here.

    Source: Mamba, arXiv 2312.00752, section 3.2. What sinks and documents are to it, and how it works over
    ranks: ``recurrence.py``, for which a channel is a group with keys of width N and values of width 1.

    Args:
        x_BTD: inputs of this rank's slice, sinks first: T is ``layout.slice_length``.
        dt_BTD: step sizes, not negative; float32 recommended.
        A_DN: not positive.
        B_BTN: how inputs are written.
        C_BTN: how states are read.
        D_D: skip connection.
        layout: sinks, documents and slices; None is one document on one rank.
        cp_group: context-parallel ranks in the order of their slices; None or one rank communicates nothing.
        backend: of :func:`selective_scan`.

    Returns:
        y [B, T, D] in x's dtype; zeros where sinks are padding.

    Raises:
        ValueError: tensors, layout and group do not fit each other.
    """

    def outputs(
        x_BTD1: Tensor, inputs: Sequence[Tensor], state: Tensor | None, cu_seqlens: Sequence[int] | None
    ) -> Tensor:
        _, dt, B, C = inputs
        y, _ = selective_scan(
            x_BTD1.squeeze(-1),
            dt,
            A_DN,
            B,
            C,
            D=D_D,
            initial_state=None if state is None else state.squeeze(-1),
            backend=backend,
            cu_seqlens=cu_seqlens,
        )
        return y.unsqueeze(-1)

    def end_state(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        x, dt, B, C = inputs
        return selective_scan_end_state(x, dt, A_DN, B, C, backend=backend)

    y_BTD1 = context_parallel_recurrence(
        Recurrence(outputs, end_state),
        x_BTD.unsqueeze(-1),
        (x_BTD, dt_BTD, B_BTN, C_BTN),
        layout=layout,
        cp_group=cp_group,
        method=LinearAttentionContextParallel.allgather,
    )
    return y_BTD1.squeeze(-1)


def selective_scan_end_state(
    x_BTD: Tensor, dt_BTD: Tensor, A_DN: Tensor, B_BTN: Tensor, C_BTN: Tensor, *, backend: str
) -> tuple[Tensor, Tensor]:
    """What ``state_passing`` sends of a slice: the state behind it from zero [B, D, N, 1] and its decay.

    Arguments are those of :func:`context_parallel_selective_scan`; the decay is [B, D, N].
    """
    _, state = selective_scan(x_BTD, dt_BTD, A_DN, B_BTN, C_BTN, output_final_state=True, backend=backend)
    assert state is not None
    decay_BDN = (dt_BTD.to(state.dtype).sum(1).unsqueeze(-1) * A_DN.to(state.dtype)).exp()
    return state.unsqueeze(-1), decay_BDN
