"""Causal and sliding-window attention by the flash-attn package (GPUs).

Releases that the calls were written against: ``flash_attn`` in architecture/backends/releases.py.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from spikingbrain_train.ops.host_numbers import on_device
from spikingbrain_train.ops.softmax_attention.documents import Documents


def flash_attn_softmax_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    *,
    window: int | None,
    scale: float,
    num_sink_tokens: int = 0,
    documents: Documents | None = None,
) -> Tensor:
    """Output [B, Tq, H, V] in q's dtype, float16 or bfloat16; groups are shared by heads inside the kernel.

    flash-attn aligns the last query with the last key, as we do. A window and sinks together are more than it
    can (see architecture/backends/softmax_attention.py).
    """
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # imported here: only GPU machines have it

    # flash-attn counts the keys to the left of the query; -1 means all.
    whole = window is None or window >= k_BTGK.shape[1] - num_sink_tokens
    window_size = (-1, -1) if whole or window is None else (window - 1, 0)
    # Its backward pass adds with atomics otherwise; releases before 2.4 do not know the argument.
    order = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
    if documents is None:
        return flash_attn_func(
            q_BTHK, k_BTGK, v_BTGV, softmax_scale=scale, causal=True, window_size=window_size, **order
        )
    key_lengths = [num_sink_tokens + length for length in documents.key_lengths]
    if num_sink_tokens:
        k_BTGK = _sinks_before_every_document(k_BTGK, documents, num_sink_tokens)
        v_BTGV = _sinks_before_every_document(v_BTGV, documents, num_sink_tokens)
    o_THV = flash_attn_varlen_func(
        q_BTHK[0],
        k_BTGK[0],
        v_BTGV[0],
        _bounds_on_device(tuple(documents.query_lengths), q_BTHK.device),
        _bounds_on_device(tuple(key_lengths), q_BTHK.device),
        max(documents.query_lengths),
        max(key_lengths),
        softmax_scale=scale,
        causal=True,
        window_size=window_size,
        **order,
    )
    return o_THV.unsqueeze(0)


def _sinks_before_every_document(x_BTGD: Tensor, documents: Documents, num_sink_tokens: int) -> Tensor:
    """[B, D * sinks + text, G, D]: flash-attn's documents share no keys."""
    sinks, *parts = x_BTGD.split([num_sink_tokens, *documents.key_lengths], dim=1)
    return torch.cat([piece for part in parts for piece in (sinks, part)], dim=1)


@lru_cache(maxsize=32)  # asked for by every layer of a micro-batch
def _bounds_on_device(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return on_device([0, *accumulate(lengths)], device, torch.int32)
