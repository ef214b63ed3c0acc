"""The selective scan by the CUDA kernel of the package mamba_ssm (``selective_scan_fn``).

Releases that the call was written against: ``mamba_ssm`` in architecture/backends/releases.py.
"""

from __future__ import annotations

from torch import Tensor


def mamba_ssm_selective_scan(
    x_BTD: Tensor, dt_BTD: Tensor, A_DN: Tensor, B_BTN: Tensor, C_BTN: Tensor
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] in x's dtype and final state [B, D, N] float32, from a zero state.

    The kernel wants time last and one dtype for all but A, which it wants in float32. It does not pass on
    gradients of the final state.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # on machines with CUDA alone

    dtype = x_BTD.dtype
    x_BDT, dt_BDT, B_BNT, C_BNT = (
        each.to(dtype).transpose(1, 2).contiguous() for each in (x_BTD, dt_BTD, B_BTN, C_BTN)
    )
    y_BDT, state_BDN = selective_scan_fn(x_BDT, dt_BDT, A_DN.float(), B_BNT, C_BNT, return_last_state=True)
    return y_BDT.transpose(1, 2), state_BDN
