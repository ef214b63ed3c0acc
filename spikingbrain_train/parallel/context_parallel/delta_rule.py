"""The gated delta rule over a sequence that may hold sinks and documents and may be split over ranks.

Shape legend: B batch, T local time, H query heads, G key/value groups, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.parallel import LinearAttentionContextParallel
from spikingbrain_train.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_end_state
from spikingbrain_train.parallel.context_parallel.recurrence import Recurrence, context_parallel_recurrence


def context_parallel_delta_rule(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_gate_BTG: Tensor,
    beta_BTG: Tensor,
    *,
    layout: SequenceLayout | None,
    cp_group: torch.distributed.ProcessGroup | None,
    method: LinearAttentionContextParallel,
    scale: float,
    backend: str,
) -> Tensor:
    """Mix a slice of a sequence as if the whole sequence were here.

    Source: Gated DeltaNet, arXiv 2412.06464, eq. 10. A slice multiplies the state before it with a matrix
    [K, K] a group; states and matrices of all ranks compose to what lies before each slice. What sinks and
    documents are to it: ``recurrence.py``. What a state before the slice adds to the outputs would cost
    another run of the recurrence, so ``allscan`` waits for that state before it runs the slice.

    Args:
        q_BTHK: queries of this rank's slice, sinks first: T is ``layout.slice_length``.
        k_BTGK: keys in q's dtype, of length 1.
        v_BTGV: values in q's dtype.
        log_gate_BTG: natural logarithm of the forget gate, in [-inf, 0], float32 recommended.
        beta_BTG: share of what is held under a key that is replaced, in the dtype of the log gate.
        layout: sinks, documents and slices; None is one document on one rank.
        cp_group: context-parallel ranks in the order of their slices; None or one rank communicates nothing.
        method: communication.
        scale: factor of the output.
        backend: of :func:`gated_delta_rule`.

    Returns:
        o [B, T, H, V] in q's dtype; zeros where sinks are padding.

    Raises:
        ValueError: tensors, layout and group do not fit each other.
    """

    def split(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        k, v, gates = inputs
        return (k, v, *gates.unbind(-1))

    def outputs(
        q: Tensor, inputs: Sequence[Tensor], state: Tensor | None, cu_seqlens: Sequence[int] | None
    ) -> Tensor:
        o, _ = gated_delta_rule(
            q, *split(inputs), scale=scale, initial_state=state, backend=backend, cu_seqlens=cu_seqlens
        )
        return o

    def end_state(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return gated_delta_rule_end_state(*split(inputs))

    return context_parallel_recurrence(
        Recurrence(outputs, end_state),
        q_BTHK,
        (k_BTGK, v_BTGV, torch.stack((log_gate_BTG, beta_BTG), dim=-1)),
        layout=layout,
        cp_group=cp_group,
        method=method,
    )
