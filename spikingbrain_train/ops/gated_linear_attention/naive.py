"""Gated linear attention as the recurrence that defines it, and its step for decoding.

The fast forms are held to it.

Shape legend: B batch, T time, H query heads, G key/value groups, R = H // G heads of a group, K key dim, V
value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain_train.ops.grouped_states import run_steps


def gated_linear_attention_step(
    q_BHK: Tensor,
    k_BGK: Tensor,
    v_BGV: Tensor,
    log_gate_BGK: Tensor,
    state_BGKV: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance the state by one token and read it (SpikingBrain, arXiv 2509.05276, eq. 10-11).

    ``S_t = diag(exp(log_gate_t)) S_{t-1} + k_t^T v_t`` and ``o_t = scale * q_t S_t`` with scale K^-0.5 by
    default. The H // G heads of a group share k, v and the gate, hence one state.

    Returns:
        o [B, H, V] in q's dtype, and the new state [B, G, K, V] in the dtype of ``state_BGKV`` (a new
        tensor).
    """
    B, H, K = q_BHK.shape
    G, V = v_BGV.shape[1:]
    dtype = state_BGKV.dtype
    scale = K**-0.5 if scale is None else scale
    gate = log_gate_BGK.to(dtype).exp().unsqueeze(-1)
    state_BGKV = torch.addcmul(
        k_BGK.to(dtype).unsqueeze(-1) * v_BGV.to(dtype).unsqueeze(-2), state_BGKV, gate
    )
    o = (q_BHK.to(dtype).view(B, G, H // G, K) * scale) @ state_BGKV
    return o.reshape(B, H, V).to(q_BHK.dtype), state_BGKV


def naive_gated_linear_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_gate_BTGK: Tensor,
    initial_state_BGKV: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Run :func:`gated_linear_attention_step` over T tokens.

    Exact for every log gate in [-inf, 0]; differentiable through autograd; slow (one Python step a token).

    Returns:
        o [B, T, H, V] in q's dtype, and the final state [B, G, K, V].
    """
    return run_steps(
        gated_linear_attention_step, q_BTHK, k_BTGK, v_BTGV, log_gate_BTGK, initial_state_BGKV, scale=scale
    )
