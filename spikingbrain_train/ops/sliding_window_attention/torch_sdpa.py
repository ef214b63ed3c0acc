"""Causal attention by ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from spikingbrain_train.ops.sliding_window_attention.reference import window_mask


def sdpa_sliding_window_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *, window: int | None, scale: float
) -> Tensor:
    """Output [B, T, H, V] in q's dtype. Full causal attention needs O(T) memory; a shorter window costs a T x
    T mask.

    Keys and values are repeated from groups to heads: before torch 2.7, ``enable_gqa`` leaves the CPU's flash
    kernel.
    """
    T, heads_per_group = q_BTHK.shape[1], q_BTHK.shape[2] // k_BTGK.shape[2]
    q = q_BTHK.transpose(1, 2)
    k, v = (x.transpose(1, 2).repeat_interleave(heads_per_group, dim=1) for x in (k_BTGK, v_BTGV))
    if window is None or window >= T:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        mask = window_mask(T, window, q.device)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return o.transpose(1, 2)
