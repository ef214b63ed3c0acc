"""The state after a slice of tokens, without the outputs.

Context parallelism sends it before local work begins.

Shape legend: B batch, T time, G key/value groups, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain_train.ops.ordered_sums import cumulative_sum


def gated_linear_attention_end_state(
    k_BTGK: Tensor, v_BTGV: Tensor, log_gate_BTGK: Tensor
) -> tuple[Tensor, Tensor]:
    """State that T tokens leave behind from a zero state, and how much of an earlier state survives them.

    ``gated_linear_attention`` over the same tokens from a state S ends in ``decay * S + state``
    (SpikingBrain, arXiv 2509.05276, eq. 10; the pair that LASP-2 gathers). One product of T x K by T x V a
    group; exact for every log gate in [-inf, 0]; differentiable.

    Args:
        k_BTGK: keys, floating point.
        v_BTGV: values in k's dtype.
        log_gate_BTGK: natural logarithm of the forget gate, each in [-inf, 0].

    Returns:
        state [B, G, K, V] and decay [B, G, K], float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit, or there is no token.
    """
    if k_BTGK.dim() != 4 or log_gate_BTGK.shape != k_BTGK.shape or v_BTGV.shape[:3] != k_BTGK.shape[:3]:
        raise ValueError(
            f"k and log_gate must be [B, T, G, K] and v [B, T, G, V], not {list(k_BTGK.shape)}, "
            f"{list(log_gate_BTGK.shape)} and {list(v_BTGV.shape)}."
        )
    if k_BTGK.shape[1] == 0:
        raise ValueError("gated_linear_attention_end_state needs at least one token: T is 0.")
    dtype = torch.float64 if k_BTGK.dtype == torch.float64 else torch.float32
    k_BGTK, v_BGTV, log_gate_BGTK = (x.to(dtype).transpose(1, 2) for x in (k_BTGK, v_BTGV, log_gate_BTGK))
    # A key decays by the gates after it. Summed from the end: differences of sums from the start would lose
    # precision next to a log gate of -50 and be NaN next to one of -inf.
    after_BGTK = torch.cat((log_gate_BGTK[:, :, 1:], torch.zeros_like(log_gate_BGTK[:, :, :1])), dim=2)
    decayed_k_BGTK = k_BGTK * cumulative_sum(after_BGTK.flip(2), 2).flip(2).exp()
    return decayed_k_BGTK.transpose(2, 3) @ v_BGTV, log_gate_BGTK.sum(2).exp()
