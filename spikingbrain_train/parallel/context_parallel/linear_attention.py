"""Gated linear attention over a sequence that may be split over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain_train.config.parallel import LinearAttentionContextParallel
from spikingbrain_train.ops.gated_linear_attention import gated_linear_attention
from spikingbrain_train.parallel.context_parallel.sequence_layout import SequenceLayout


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
    """Local form only."""
    return gated_linear_attention(q_BTHK, k_BTGK, v_BTGV, log_gate_BTGK, scale=scale, backend=backend)[0]
