"""Causal sliding-window attention by kernels that only GPUs run: the flash-attn package and torch's flex
attention."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


def flash_attn_sliding_window_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *, window: int | None, scale: float
) -> Tensor:
    """Output [B, T, H, V] in q's dtype, float16 or bfloat16; groups are shared by heads inside the kernel."""
    from flash_attn import flash_attn_func  # imported here: only GPU machines have it

    # flash-attn counts the keys to the left of the query; -1 means all.
    window_size = (-1, -1) if window is None else (window - 1, 0)
    return flash_attn_func(q_BTHK, k_BTGK, v_BTGV, softmax_scale=scale, causal=True, window_size=window_size)


@cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _block_mask(T: int, window: int, device: torch.device) -> Any:
    """Which blocks of a T x T product the kernel visits; O((T / 128)^2) memory, kept for the lengths of a
    run."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    return create_block_mask(visible, None, None, T, T, device=str(device))


def flex_sliding_window_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *, window: int | None, scale: float
) -> Tensor:
    """Output [B, T, H, V] in q's dtype; torch compiles the kernel for each new shape."""
    T, heads_per_group = q_BTHK.shape[1], q_BTHK.shape[2] // k_BTGK.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGV))
    block_mask = _block_mask(T, T if window is None else min(window, T), q.device)
    o = _compiled_flex_attention()(
        q, k, v, block_mask=block_mask, scale=scale, enable_gqa=heads_per_group > 1
    )
    return o.transpose(1, 2)
