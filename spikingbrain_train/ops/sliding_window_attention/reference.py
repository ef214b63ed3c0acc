"""Causal sliding-window attention as a masked softmax: the readable reference (O(T^2) memory)."""

from __future__ import annotations

import torch
from torch import Tensor


def window_mask(T: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """Boolean [T, T], True where query t (row) sees key s (column): ``t - window < s <= t``; None is full
    causal."""
    mask = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def reference_sliding_window_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *, window: int | None, scale: float
) -> Tensor:
    """``softmax(scale q k^T + mask) v`` in at least float32: [B, T, H, V] in q's dtype."""
    dtype = torch.float64 if q_BTHK.dtype == torch.float64 else torch.float32
    heads_per_group = q_BTHK.shape[2] // k_BTGK.shape[2]
    q = q_BTHK.to(dtype).transpose(1, 2)
    k, v = (x.to(dtype).transpose(1, 2).repeat_interleave(heads_per_group, dim=1) for x in (k_BTGK, v_BTGV))
    scores = q @ k.transpose(-1, -2) * scale
    mask = window_mask(q.shape[2], window, q.device)
    o = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v
    return o.transpose(1, 2).to(q_BTHK.dtype)
