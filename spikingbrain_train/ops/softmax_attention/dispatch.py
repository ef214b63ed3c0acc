"""The one entry point of causal and sliding-window softmax attention.

It checks the inputs and chooses a backend.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from spikingbrain_train.architecture.backends.softmax_attention import (
    SOFTMAX_ATTENTION,
    SoftmaxAttentionCall,
)
from spikingbrain_train.ops.softmax_attention.blocked import blocked_softmax_attention
from spikingbrain_train.ops.softmax_attention.documents import as_documents, for_each_document
from spikingbrain_train.ops.softmax_attention.flash import flash_attn_softmax_attention
from spikingbrain_train.ops.softmax_attention.flex import flex_softmax_attention
from spikingbrain_train.ops.softmax_attention.naive import naive_softmax_attention
from spikingbrain_train.ops.softmax_attention.torch_sdpa import sdpa_softmax_attention
from spikingbrain_train.runtime.packages import machine_of

_ONE_DOCUMENT = {
    "naive": naive_softmax_attention,
    "blocked": blocked_softmax_attention,
    "sdpa": sdpa_softmax_attention,
}
_ANY_DOCUMENTS = {
    "flash_attn": flash_attn_softmax_attention,
    "flex": flex_softmax_attention,
}


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    scale: float | None = None,
    backend: str = "auto",
    num_sink_tokens: int = 0,
    cu_seqlens_q: Sequence[int] | Tensor | None = None,
    cu_seqlens_k: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Causal softmax attention: a query at text key t sees all sinks and text ``t - window + 1 .. t``.

    Source: SpikingBrain, arXiv 2509.05276, eq. 1 (full) and eq. 2 (window). Head h reads group ``h // (H //
    G)``. Positions must be encoded into q and k before (RoPE).

    Keys are ``num_sink_tokens`` sinks followed by Tk >= Tq keys of text. The last query stands at the last
    key, as in flash-attn: query i at text key ``Tk - Tq + i``. With ``cu_seqlens_q`` and ``cu_seqlens_k`` the
    text is several documents that do not see each other; the last query of each stands at its last key, and
    all of them see all sinks.

    Args:
        q: queries [B, Tq, H, K], floating point.
        k: keys [B, num_sink_tokens + Tk, G, K] in q's dtype; H is a multiple of G.
        v: values [B, num_sink_tokens + Tk, G, V] in q's dtype.
        window: number of text keys that a query sees, its own included; None or at least Tk is full causal
            attention.
        scale: factor of the scores, K ** -0.5 by default.
        backend: ``naive`` (masked softmax, slow), ``blocked`` (O(T * window) work, O(T) memory, made for
            CPU), ``sdpa`` (torch; a short window costs a Tq x Tk mask), ``flash_attn`` and ``flex`` (GPU), or
            ``auto``: see :func:`choose_backend`.
        num_sink_tokens: keys in front of the text that every query sees.
        cu_seqlens_q: bounds of the documents among the queries [0, ..., Tq], integers; B must be 1. A tensor
            on a GPU is waited for.
        cu_seqlens_k: bounds of the same documents among the text keys [0, ..., Tk]. A document may have keys
            without queries, but no queries without keys.

    Returns:
        o [B, Tq, H, V] in q's dtype.

    Raises:
        ValueError: shapes, dtypes, the window, the bounds or the backend name do not fit, or the backend
            asked for cannot do what is asked of it.
        PlatformError: the backend asked for needs a package or a GPU that is missing.
    """
    _check(q, k, v, window, num_sink_tokens)
    Tq, Tk = q.shape[1], k.shape[1] - num_sink_tokens
    documents = as_documents(cu_seqlens_q, cu_seqlens_k, B=q.shape[0], Tq=Tq, Tk=Tk)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = SoftmaxAttentionCall(
        dtype=str(q.dtype).removeprefix("torch."),
        key_dim=q.shape[-1],
        value_dim=v.shape[-1],
        num_text_keys=Tk,
        window=window,
        num_sink_tokens=num_sink_tokens,
        has_documents=documents is not None,
    )
    name = choose_backend(backend, call, q.device.type)
    if name in _ANY_DOCUMENTS:
        return _ANY_DOCUMENTS[name](
            q, k, v, window=window, scale=scale, num_sink_tokens=num_sink_tokens, documents=documents
        )
    run = _ONE_DOCUMENT[name]
    if documents is None:
        return run(q, k, v, window=window, scale=scale, num_sink_tokens=num_sink_tokens)
    return for_each_document(
        run, q, k, v, documents, window=window, scale=scale, num_sink_tokens=num_sink_tokens
    )


def choose_backend(backend: str, call: SoftmaxAttentionCall, device_type: str) -> str:
    """The kernel that computes a call: the one asked for, or under ``auto`` the best that is here and can.

    What each of them needs, what it cannot do, and which is best: architecture/backends/softmax_attention.py.

    Args:
        backend: as in :func:`softmax_attention`.
        call: what is to be computed.
        device_type: ``cuda``, ``cpu`` or another of torch's.

    Raises:
        ValueError: the name does not exist, or what it names cannot do this.
        PlatformError: what it names needs a package or a GPU that is missing.
    """
    return SOFTMAX_ATTENTION.choose(backend, call, machine_of(device_type))


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, num_sink_tokens: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have four dimensions [B, T, heads or groups, dim], not {list(x.shape)}."
            )
    B, Tq, H, K = q.shape
    S, G, V = v.shape[1:]
    if Tq == 0:
        raise ValueError("softmax_attention needs at least one query: T is 0.")
    if num_sink_tokens < 0 or S - num_sink_tokens < Tq:
        raise ValueError(
            f"v holds {S} tokens: too few for num_sink_tokens={num_sink_tokens} and a key for each "
            f"of {Tq} queries."
        )
    if G == 0 or H % G:
        raise ValueError(f"The number of query heads ({H}) must be a multiple of the number of groups ({G}).")
    for name, x, expected in (("k", k, (B, S, G, K)), ("v", v, (B, S, G, V))):
        if x.shape != expected:
            raise ValueError(f"{name} must be {list(expected)} to go with q and v, not {list(x.shape)}.")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating dtype, not {q.dtype}, {k.dtype} and {v.dtype}.")
    if window is not None and window < 1:
        raise ValueError(
            f"window is {window}: it must be at least 1 (the token itself), or None for full attention."
        )
