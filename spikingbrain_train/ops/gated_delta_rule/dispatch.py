"""The one entry point of the gated delta rule: checks the inputs and chooses a backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from spikingbrain_train.architecture.backends.gated_delta_rule import GATED_DELTA_RULE, DeltaRuleCall
from spikingbrain_train.ops.document_bounds import document_bounds, run_documents
from spikingbrain_train.ops.gated_delta_rule.chunk import chunk_gated_delta_rule
from spikingbrain_train.ops.gated_delta_rule.flash_linear_attention import fla_gated_delta_rule
from spikingbrain_train.ops.gated_delta_rule.naive import naive_gated_delta_rule
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
    _check(q, k, v, log_gate, beta, initial_state, bounds)
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
    state_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if initial_state is None:
        B, _, G, K = k.shape
        num_states = B if bounds is None else len(bounds) - 1
        state = torch.zeros(num_states, G, K, v.shape[-1], dtype=state_dtype, device=q.device)
    else:
        state = initial_state.to(state_dtype)
    run = partial(naive_gated_delta_rule if name == "naive" else chunk_gated_delta_rule, scale=scale)
    inputs = (q, k, v, log_gate, beta)
    if bounds is None or len(bounds) == 2:
        o, final_state = run(*inputs, state)
    else:
        o, final_state = run_documents(run, inputs, state, bounds)
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


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    bounds: tuple[int, ...] | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have four dimensions [B, T, heads or groups, dim], not {list(x.shape)}."
            )
    B, T, H, K = q.shape
    G, V = v.shape[2:]
    if T == 0:
        raise ValueError("gated_delta_rule needs at least one token: T is 0.")
    if G == 0 or H % G:
        raise ValueError(f"The number of query heads ({H}) must be a multiple of the number of groups ({G}).")
    for name, x, expected in (
        ("k", k, (B, T, G, K)),
        ("v", v, (B, T, G, V)),
        ("log_gate", log_gate, (B, T, G)),
        ("beta", beta, (B, T, G)),
    ):
        if x.shape != expected:
            raise ValueError(f"{name} must be {list(expected)} to go with q and v, not {list(x.shape)}.")
    num_states = B if bounds is None else len(bounds) - 1
    if initial_state is not None and initial_state.shape != (num_states, G, K, V):
        raise ValueError(f"initial_state must be {[num_states, G, K, V]}, not {list(initial_state.shape)}.")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating dtype, not {q.dtype}, {k.dtype} and {v.dtype}.")
    for name, x in (("log_gate", log_gate), ("beta", beta)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {x.dtype}.")
