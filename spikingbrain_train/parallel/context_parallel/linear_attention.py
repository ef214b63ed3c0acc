"""Gated linear attention over a sequence that may hold sinks and documents and may be split over ranks.

Shape legend: B batch, T local time, H query heads, G key/value groups, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.parallel import LinearAttentionContextParallel
from spikingbrain_train.ops.gated_linear_attention import (
    gated_linear_attention,
    gated_linear_attention_end_state,
)
from spikingbrain_train.ops.ordered_sums import cumulative_sum
from spikingbrain_train.parallel.context_parallel.recurrence import Recurrence, context_parallel_recurrence


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

    Source: SpikingBrain, arXiv 2509.05276, eq. 10-11. What sinks and documents are to it, and how it works
    over ranks: ``recurrence.py``.

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

    def outputs(
        q: Tensor, inputs: Sequence[Tensor], state: Tensor | None, cu_seqlens: Sequence[int] | None
    ) -> Tensor:
        o, _ = gated_linear_attention(
            q, *inputs, scale=scale, initial_state=state, backend=backend, cu_seqlens=cu_seqlens
        )
        return o

    def end_state(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return gated_linear_attention_end_state(*inputs)

    def reading(q_BTHK: Tensor, inputs: Sequence[Tensor], state_BGKV: Tensor) -> Tensor:
        """``scale * q * exp(sum of log gates) S``."""
        (G, V), log_gate_BTGK = (state_BGKV.shape[1], state_BGKV.shape[3]), inputs[2]
        decay_BTGK = cumulative_sum(log_gate_BTGK.to(state_BGKV.dtype), 1).exp() * scale
        q_BTGRK = q_BTHK.unflatten(2, (G, -1)) * decay_BTGK.to(q_BTHK.dtype).unsqueeze(3)
        o_BTGRV = torch.einsum("btgrk,bgkv->btgrv", q_BTGRK, state_BGKV.to(q_BTHK.dtype))
        return o_BTGRV.reshape(*q_BTHK.shape[:3], V)

    return context_parallel_recurrence(
        Recurrence(outputs, end_state, reading),
        q_BTHK,
        (k_BTGK, v_BTGV, log_gate_BTGK),
        layout=layout,
        cp_group=cp_group,
        method=method,
    )
