"""The one entry point of causal and sliding-window softmax attention: checks the inputs and chooses a
backend."""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain_train.ops.backends import has_package, require_gpu, require_package, unknown_backend
from spikingbrain_train.ops.sliding_window_attention.blocked import blocked_sliding_window_attention
from spikingbrain_train.ops.sliding_window_attention.gpu_kernels import (
    flash_attn_sliding_window_attention,
    flex_sliding_window_attention,
)
from spikingbrain_train.ops.sliding_window_attention.reference import reference_sliding_window_attention
from spikingbrain_train.ops.sliding_window_attention.torch_sdpa import sdpa_sliding_window_attention

_RUN = {
    "reference": reference_sliding_window_attention,
    "blocked": blocked_sliding_window_attention,
    "sdpa": sdpa_sliding_window_attention,
    "flash_attn": flash_attn_sliding_window_attention,
    "flex": flex_sliding_window_attention,
}
BACKENDS = ("auto", *_RUN)
_HALF = (torch.float16, torch.bfloat16)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal softmax attention in which query t sees keys ``t - window + 1 .. t``.

    Source: SpikingBrain, arXiv 2509.05276, eq. 1 (full) and eq. 2 (window). Head h reads group ``h // (H //
    G)``. Positions must be encoded into q and k before (RoPE).

    Args:
        q: queries [B, T, H, K], floating point.
        k: keys [B, T, G, K] in q's dtype; H is a multiple of G.
        v: values [B, T, G, V] in q's dtype.
        window: number of keys that a query sees, itself included; None or at least T is full causal
            attention.
        scale: factor of the scores, K ** -0.5 by default.
        backend: ``reference`` (masked softmax, slow), ``blocked`` (O(T * window) work, O(T) memory, made for
            CPU), ``sdpa`` (torch; a short window costs a T x T mask), ``flash_attn`` and ``flex`` (GPU), or
            ``auto``: blocked on CPU; on a GPU flash_attn where it is installed and fits the dtype, else sdpa
            for full causal attention and flex for windows.

    Returns:
        o [B, T, H, V] in q's dtype.

    Raises:
        ValueError: shapes, dtypes, the window or the backend name do not fit.
        PlatformError: the backend asked for needs a package or a GPU that is missing.
    """
    _check(q, k, v, window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _RUN[_resolve(backend, q, window)](q, k, v, window=window, scale=scale)


def _resolve(backend: str, q: Tensor, window: int | None) -> str:
    setting = f"softmax_attention={backend}"
    if backend not in BACKENDS:
        raise unknown_backend(setting, BACKENDS)
    on_gpu = q.device.type == "cuda"
    if backend == "auto":
        if not on_gpu:
            return "blocked"
        if has_package("flash_attn") and q.dtype in _HALF:
            return "flash_attn"
        return "sdpa" if window is None or window >= q.shape[1] else "flex"
    if backend in ("flash_attn", "flex"):
        require_gpu(q.device.type, setting)
    if backend == "flash_attn":
        require_package("flash_attn", "flash-attn", setting)
        if q.dtype not in _HALF:
            raise ValueError(
                f"{setting} needs float16 or bfloat16, not {q.dtype}: choose auto or train in bfloat16."
            )
    return backend


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have four dimensions [B, T, heads or groups, dim], not {list(x.shape)}."
            )
    B, T, H, K = q.shape
    G, V = v.shape[2:]
    if T == 0:
        raise ValueError("sliding_window_attention needs at least one token: T is 0.")
    if G == 0 or H % G:
        raise ValueError(f"The number of query heads ({H}) must be a multiple of the number of groups ({G}).")
    for name, x, expected in (("k", k, (B, T, G, K)), ("v", v, (B, T, G, V))):
        if x.shape != expected:
            raise ValueError(f"{name} must be {list(expected)} to go with q and v, not {list(x.shape)}.")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating dtype, not {q.dtype}, {k.dtype} and {v.dtype}.")
    if window is not None and window < 1:
        raise ValueError(
            f"window is {window}: it must be at least 1 (the token itself), or None for full attention."
        )
