"""Softmax attention over a sequence that may be split over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain_train.config.parallel import SlidingWindowContextParallel
from spikingbrain_train.ops.sliding_window_attention import sliding_window_attention
from spikingbrain_train.parallel.context_parallel.sequence_layout import SequenceLayout


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
    """Local form only."""
    return sliding_window_attention(q_BTHK, k_BTGK, v_BTGV, window=window, scale=scale, backend=backend)
