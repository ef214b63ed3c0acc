"""Attention by ``torch.nn.functional.scaled_dot_product_attention``: causal, and without a mask."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from spikingbrain_train.ops.softmax_attention.naive import visibility_mask


def _heads_first(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, T, *] each, keys and values repeated from groups to heads.

    Before torch 2.7, ``enable_gqa`` leaves the CPU's flash kernel.
    """
    heads_per_group = q_BTHK.shape[2] // k_BTGK.shape[2]
    k, v = (x.transpose(1, 2).repeat_interleave(heads_per_group, dim=1) for x in (k_BTGK, v_BTGV))
    return q_BTHK.transpose(1, 2), k, v


def sdpa_softmax_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    *,
    window: int | None,
    scale: float,
    num_sink_tokens: int = 0,
) -> Tensor:
    """Output [B, Tq, H, V] in q's dtype.

    Full causal attention needs O(T) memory; a shorter window costs a Tq x Tk mask.
    """
    q, k, v = _heads_first(q_BTHK, k_BTGK, v_BTGV)
    Tq, S = q.shape[2], k.shape[2]
    if window is None or window >= S - num_sink_tokens:
        # torch's causal mask is aligned at the first query and key, ours at the last ones. Queries of zeros
        # in front make it the same, and sinks are then just the first keys of a longer causal sequence.
        o = F.scaled_dot_product_attention(F.pad(q, (0, 0, S - Tq, 0)), k, v, is_causal=True, scale=scale)
        return o[:, :, S - Tq :].transpose(1, 2)
    mask = visibility_mask(Tq, S - num_sink_tokens, window, num_sink_tokens, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def bidirectional_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attention in which every query sees every key: how sink tokens see each other.

    Args:
        q_BTHK: queries, floating point.
        k_BTGK: keys in q's dtype; H is a multiple of G and head h reads group ``h // (H // G)``.
        v_BTGV: values in q's dtype.
        scale: factor of the scores, K ** -0.5 by default.

    Returns:
        o [B, Tq, H, V] in q's dtype.
    """
    q, k, v = _heads_first(q_BTHK, k_BTGK, v_BTGV)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
