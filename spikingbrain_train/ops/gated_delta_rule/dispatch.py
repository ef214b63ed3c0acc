"""The one entry point of the gated delta rule: checks the inputs and chooses a backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from spikingbrain_train.architecture.backends.gated_delta_rule import GATED_DELTA_RULE, DeltaRuleCall
from spikingbrain_train.ops.document_bounds import document_bounds
from spikingbrain_train.ops.gated_delta_rule.chunk import chunk_gated_delta_rule
from spikingbrain_train.ops.gated_delta_rule.flash_linear_attention import fla_gated_delta_rule
from spikingbrain_train.ops.gated_delta_rule.naive import naive_gated_delta_rule
from spikingbrain_train.ops.grouped_states import check_inputs, run_from_states
from spikingbrain_train.runtime.packages import machine_of


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
    cu_seqlens: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``S_t = g_t (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t``, ``o_t = scale * q_t S_t``.

    Source: Gated DeltaNet, arXiv 2412.06464, eq. 10; ``g_t = exp(log_gate_t)``. Head h reads group
    ``h // (H // G)``; k, v, the gate and beta are shared by the heads of a group, so one state a group is
    kept. Differentiable once with respect to all six tensors.

    Args:
        q: queries [B, T, H, K], floating point.
        k: keys [B, T, G, K] in q's dtype; H is a multiple of G. Of length 1, or at most so that beta times
            their squared length stays below 2: beyond, states grow from token to token.
        v: values [B, T, G, V] in q's dtype.
        log_gate: natural logarithm of the forget gate [B, T, G], each in [-inf, 0]; any floating dtype,
            float32 recommended (bfloat16 gates close to 1 are too coarse).
        beta: share of what is held under a key that is replaced [B, T, G], in [0, 1]; any floating dtype.
        scale: factor of the output, K ** -0.5 by default.
        initial_state: state before the first token [B, G, K, V]; zeros by default. With ``cu_seqlens``,
            before the first token of every document [D, G, K, V].
        output_final_state: also return the state after the last token.
        backend: ``naive`` (the recurrence, slow), ``chunk`` (PyTorch, any device), ``fla`` (Triton kernels on
            GPUs), or ``auto``: see :func:`choose_backend`.
        cu_seqlens: D documents that do not see each other, as in fla: [0, end of the first, ..., T], D + 1
            integers. B must be 1.

    Returns:
        o [B, T, H, V] in q's dtype, and the final state [B, G, K, V] (with ``cu_seqlens`` [D, G, K, V]) in
        float32 (float64 for float64 inputs) or None.

    Raises:
        ValueError: shapes, dtypes, documents or the backend name do not fit, or the backend asked for cannot
            do what is asked of it.
        PlatformError: the backend asked for needs a package or a GPU that is missing.
    """
    bounds = None if cu_seqlens is None else document_bounds(cu_seqlens, *q.shape[:2])
    gates = {"log_gate": log_gate, "beta": beta}
    check_inputs("gated_delta_rule", q, k, v, gates, initial_state, bounds, gate_a_channel=False)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    name = choose_backend(backend, q.dtype, q.shape[-1], q.device.type)
    if name == "fla":
        return fla_gated_delta_rule(
            q,
            k,
            v,
            log_gate,
            beta,
            initial_state,
            scale=scale,
            output_final_state=output_final_state,
            cu_seqlens=bounds,
        )
    form = naive_gated_delta_rule if name == "naive" else chunk_gated_delta_rule
    o, final_state = run_from_states(
        partial(form, scale=scale), (q, k, v, log_gate, beta), initial_state, bounds
    )
    return o, final_state if output_final_state else None


def choose_backend(backend: str, dtype: torch.dtype, key_dim: int, device_type: str) -> str:
    """The kernel that computes a call: the one asked for, or under ``auto`` the best that is here and can.

    What each of them needs and which is best: architecture/backends/gated_delta_rule.py.

    Args:
        backend: as in :func:`gated_delta_rule`.
        dtype: of q, k and v.
        key_dim: K.
        device_type: ``cuda``, ``cpu`` or another of torch's.

    Raises:
        ValueError: the name does not exist, or what it names cannot do this.
        PlatformError: what it names needs a package or a GPU that is missing.
    """
    call = DeltaRuleCall(str(dtype).removeprefix("torch."), key_dim)
    return GATED_DELTA_RULE.choose(backend, call, machine_of(device_type))
