"""The selective scan as the recurrence that defines it, and its step for decoding.

The fast forms are held to it.

Shape legend: B batch, T time, D channels, N state size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan_step(
    x_BD: Tensor, dt_BD: Tensor, A_DN: Tensor, B_BN: Tensor, C_BN: Tensor, state_BDN: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance the state by one token and read it (Mamba, arXiv 2312.00752, eq. 2 and 4, as in its code).

    ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t`` and ``y_t = C_t h_t``: a zero-order hold for A and, as in the
    published code, Euler's rule for B. B and C are shared by all channels.

    Returns:
        y [B, D] in x's dtype, and the new state [B, D, N] in the dtype of ``state_BDN`` (a new tensor).
    """
    dtype = state_BDN.dtype
    x, dt, A, B, C = (each.to(dtype) for each in (x_BD, dt_BD, A_DN, B_BN, C_BN))
    decay_BDN = (dt.unsqueeze(-1) * A).exp()
    state_BDN = decay_BDN * state_BDN + (dt * x).unsqueeze(-1) * B.unsqueeze(1)
    return (state_BDN @ C.unsqueeze(-1)).squeeze(-1).to(x_BD.dtype), state_BDN


def naive_selective_scan(
    x_BTD: Tensor, dt_BTD: Tensor, A_DN: Tensor, B_BTN: Tensor, C_BTN: Tensor, initial_state_BDN: Tensor
) -> tuple[Tensor, Tensor]:
    """Run :func:`selective_scan_step` over T tokens.

    Differentiable through autograd; slow (one Python step a token, every state is kept).

    Returns:
        y [B, T, D] in x's dtype, and the final state [B, D, N].
    """
    state, outputs = initial_state_BDN, []
    for t in range(x_BTD.shape[1]):
        y, state = selective_scan_step(x_BTD[:, t], dt_BTD[:, t], A_DN, B_BTN[:, t], C_BTN[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state
