"""The gated delta rule as the recurrence that defines it, and its step for decoding.

The fast forms are held to it.

Shape legend: B batch, T time, H query heads, G key/value groups, R = H // G heads of a group, K key dim, V
value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain_train.ops.grouped_states import run_steps


def gated_delta_rule_step(
    q_BHK: Tensor,
    k_BGK: Tensor,
    v_BGV: Tensor,
    log_gate_BG: Tensor,
    beta_BG: Tensor,
    state_BGKV: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance the state by one token and read it (Gated DeltaNet, arXiv 2412.06464, eq. 10).

    ``S_t = g_t (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t`` with ``g_t = exp(log_gate_t)`` and
    ``o_t = scale * q_t S_t``: the paper's states are transposed. Computed as the delta rule says it: what the
    faded state holds under the key is replaced, by the share beta, with the new value. The H // G heads of a
    group share k, v, the gate and beta, hence one state.

    Returns:
        o [B, H, V] in q's dtype, and the new state [B, G, K, V] in the dtype of ``state_BGKV`` (a new
        tensor).
    """
    B, H, K = q_BHK.shape
    G, V = v_BGV.shape[1:]
    dtype = state_BGKV.dtype
    scale = K**-0.5 if scale is None else scale
    k, v, beta = k_BGK.to(dtype), v_BGV.to(dtype), beta_BG.to(dtype)
    faded = state_BGKV * log_gate_BG.to(dtype).exp()[..., None, None]
    held = (k.unsqueeze(-2) @ faded).squeeze(-2)
    correction = (v - held) * beta.unsqueeze(-1)
    state = torch.addcmul(faded, k.unsqueeze(-1), correction.unsqueeze(-2))
    o = (q_BHK.to(dtype).view(B, G, H // G, K) * scale) @ state
    return o.reshape(B, H, V).to(q_BHK.dtype), state


def naive_gated_delta_rule(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_gate_BTG: Tensor,
    beta_BTG: Tensor,
    initial_state_BGKV: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Run :func:`gated_delta_rule_step` over T tokens.

    Exact for every log gate in [-inf, 0]; differentiable through autograd; slow (one Python step a token).

    Returns:
        o [B, T, H, V] in q's dtype, and the final state [B, G, K, V].
    """
    return run_steps(
        gated_delta_rule_step, q_BTHK, k_BTGK, v_BTGV, log_gate_BTG, beta_BTG, initial_state_BGKV, scale=scale
    )
