"""The one entry point of gated linear attention: checks the inputs and chooses a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain_train.ops.backends import has_package, require_gpu, require_package, unknown_backend
from spikingbrain_train.ops.gated_linear_attention.chunk import chunk_gated_linear_attention
from spikingbrain_train.ops.gated_linear_attention.flash_linear_attention import fla_gated_linear_attention
from spikingbrain_train.ops.gated_linear_attention.recurrent import recurrent_gated_linear_attention

BACKENDS = ("auto", "recurrent", "chunk", "fla")


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention: ``S_t = diag(exp(log_gate_t)) S_{t-1} + k_t^T v_t``, ``o_t = scale * q_t S_t``.

    Source: SpikingBrain, arXiv 2509.05276, eq. 10-11. Head h reads group ``h // (H // G)``; k, v and the gate
    are shared by the heads of a group, so one state a group is kept. Differentiable once with respect to all
    five tensors.

    Args:
        q: queries [B, T, H, K], floating point.
        k: keys [B, T, G, K] in q's dtype; H is a multiple of G.
        v: values [B, T, G, V] in q's dtype.
        log_gate: natural logarithm of the forget gate [B, T, G, K], each in [-inf, 0]; any floating dtype,
            float32 recommended (bfloat16 gates close to 1 are too coarse). ``fla`` needs finite values.
        scale: factor of the output, K ** -0.5 by default.
        initial_state: state before the first token [B, G, K, V]; zeros by default.
        output_final_state: also return the state after the last token.
        backend: ``recurrent`` (reference, slow), ``chunk`` (PyTorch, any device), ``fla`` (Triton kernels on
            GPUs), or ``auto``: fla on a GPU that has it, else chunk.

    Returns:
        o [B, T, H, V] in q's dtype, and the final state [B, G, K, V] in float32 (float64 for float64 inputs)
        or None.

    Raises:
        ValueError: shapes, dtypes or the backend name do not fit.
        PlatformError: the backend asked for needs a package or a GPU that is missing.
    """
    _check(q, k, v, log_gate, initial_state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if _resolve(backend, q) == "fla":
        return fla_gated_linear_attention(
            q, k, v, log_gate, initial_state, scale=scale, output_final_state=output_final_state
        )
    state_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if initial_state is None:
        B, _, G, K = k.shape
        state = torch.zeros(B, G, K, v.shape[-1], dtype=state_dtype, device=q.device)
    else:
        state = initial_state.to(state_dtype)
    run = recurrent_gated_linear_attention if backend == "recurrent" else chunk_gated_linear_attention
    o, final_state = run(q, k, v, log_gate, state, scale=scale)
    return o, final_state if output_final_state else None


def _resolve(backend: str, q: Tensor) -> str:
    setting = f"gated_linear_attention={backend}"
    if backend not in BACKENDS:
        raise unknown_backend(setting, BACKENDS)
    if backend == "fla":
        require_gpu(q.device.type, setting)
        require_package("fla", "flash-linear-attention", setting)
    if backend == "auto":
        return "fla" if q.device.type == "cuda" and has_package("fla") else "chunk"
    return backend


def _check(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, initial_state: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("log_gate", log_gate)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have four dimensions [B, T, heads or groups, dim], not {list(x.shape)}."
            )
    B, T, H, K = q.shape
    G, V = v.shape[2:]
    if T == 0:
        raise ValueError("gated_linear_attention needs at least one token: T is 0.")
    if G == 0 or H % G:
        raise ValueError(f"The number of query heads ({H}) must be a multiple of the number of groups ({G}).")
    for name, x, expected in (
        ("k", k, (B, T, G, K)),
        ("v", v, (B, T, G, V)),
        ("log_gate", log_gate, (B, T, G, K)),
    ):
        if x.shape != expected:
            raise ValueError(f"{name} must be {list(expected)} to go with q and v, not {list(x.shape)}.")
    if initial_state is not None and initial_state.shape != (B, G, K, V):
        raise ValueError(f"initial_state must be {[B, G, K, V]}, not {list(initial_state.shape)}.")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating dtype, not {q.dtype}, {k.dtype} and {v.dtype}.")
    if not log_gate.is_floating_point():
        raise ValueError(f"log_gate must be floating point, not {log_gate.dtype}.")
