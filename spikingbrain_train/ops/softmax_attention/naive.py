"""Causal sliding-window attention as a masked softmax: what fast forms are held to. O(Tq * Tk) memory."""

from __future__ import annotations

import torch
from torch import Tensor


def visibility_mask(
    Tq: int, Tk: int, window: int | None, num_sink_tokens: int = 0, device: torch.device | None = None
) -> Tensor:
    """Boolean [Tq, num_sink_tokens + Tk], True where a query (row) sees a key (column).

    The last query stands at the last key. A query at text key t sees all sinks and text keys ``t - window < s
    <= t``; None is full causal.
    """
    mask = torch.ones(Tq, Tk, dtype=torch.bool, device=device).tril(Tk - Tq)
    if window is not None:
        mask.triu_(Tk - Tq + 1 - window)
    return torch.nn.functional.pad(mask, (num_sink_tokens, 0), value=True)


def naive_softmax_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    *,
    window: int | None,
    scale: float,
    num_sink_tokens: int = 0,
) -> Tensor:
    """``softmax(scale q k^T + mask) v`` in at least float32: [B, Tq, H, V] in q's dtype."""
    dtype = torch.float64 if q_BTHK.dtype == torch.float64 else torch.float32
    heads_per_group = q_BTHK.shape[2] // k_BTGK.shape[2]
    q = q_BTHK.to(dtype).transpose(1, 2)
    k, v = (x.to(dtype).transpose(1, 2).repeat_interleave(heads_per_group, dim=1) for x in (k_BTGK, v_BTGV))
    scores = q @ k.transpose(-1, -2) * scale
    mask = visibility_mask(q.shape[2], k.shape[2] - num_sink_tokens, window, num_sink_tokens, q.device)
    o = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v
    return o.transpose(1, 2).to(q_BTHK.dtype)
