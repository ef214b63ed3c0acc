"""Gated linear attention by the Triton kernels of flash-linear-attention (``fla.ops.gla``), for GPUs.

Releases that the call was written against: ``fla`` in architecture/backends/releases.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spikingbrain_train.ops.grouped_states import run_by_heads
from spikingbrain_train.ops.host_numbers import on_device

# exp(-100) is below the smallest normal float32: such a gate has forgotten everything. fla takes differences
# of summed log gates, so -inf would give NaN, and sums of far stronger ones leave no digits for weak ones.
_STRONGEST_LOG_GATE = -100.0


class _Summable(torch.autograd.Function):
    """Log gates that fla can sum.

    The gradient passes: it is none to float32 where gates are cut off, and a mask of those would have to be
    kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, log_gate: Tensor) -> Tensor:
        return log_gate.clamp(min=_STRONGEST_LOG_GATE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def summable(log_gate: Tensor) -> Tensor:
    """Log gates in [-inf, 0] as fla's kernels can sum them: none is below what has forgotten everything."""
    return _Summable.apply(log_gate)


@lru_cache(maxsize=64)
def bounds_on_device(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    """The same tensor for the same documents: fla prepares its chunk indices once and not in every layer."""
    return on_device(cu_seqlens, device, torch.int64)


def fla_gated_linear_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_gate_BTGK: Tensor,
    initial_state_BGKV: Tensor | None,
    *,
    scale: float,
    output_final_state: bool,
    cu_seqlens: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Output [B, T, H, V] and final state [B, G, K, V] float32, or None unless asked for.

    With ``cu_seqlens`` [0, end of the first document, ..., T] B is 1 and the states are one a document.
    Log gates may be anything in [-inf, 0].
    """
    from fla.ops.gla import chunk_gla  # imported here: fla needs Triton, which only GPU machines have

    return run_by_heads(
        chunk_gla,
        q_BTHK,
        (k_BTGK, v_BTGV, summable(log_gate_BTGK)),
        initial_state_BGKV,
        scale=scale,
        output_final_state=output_final_state,
        cu_seqlens=None if cu_seqlens is None else bounds_on_device(cu_seqlens, q_BTHK.device),
    )
