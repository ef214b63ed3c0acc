"""What a slice of tokens makes of the state before it, without the outputs.

Context parallelism sends it before local work begins.

Shape legend: B batch, T time, G key/value groups, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain_train.ops.gated_delta_rule.chunk import chunk_final_state


def gated_delta_rule_end_state(
    k_BTGK: Tensor, v_BTGV: Tensor, log_gate_BTG: Tensor, beta_BTG: Tensor
) -> tuple[Tensor, Tensor]:
    """State that T tokens leave behind from a zero state, and the matrix they multiply an earlier one with.

    ``gated_delta_rule`` over the same tokens from a state S ends in ``transition @ S + state``: the product
    of ``g_t (I - beta_t k_t^T k_t)`` (arXiv 2412.06464, eq. 10) from the last token to the first, and what
    they write. Both are one run of the recurrence: with values [v 0] it takes the state [0 I] to
    [state transition].

    Args:
        k_BTGK: keys, floating point.
        v_BTGV: values in k's dtype.
        log_gate_BTG: natural logarithm of the forget gate, each in [-inf, 0].
        beta_BTG: share of what is held under a key that is replaced, each in [0, 2].

    Returns:
        state [B, G, K, V] and transition [B, G, K, K], float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit, or there is no token.
    """
    of_groups = k_BTGK.shape[:3]
    if k_BTGK.dim() != 4 or any(x.shape[:3] != of_groups for x in (v_BTGV, log_gate_BTG, beta_BTG)):
        raise ValueError(
            f"k must be [B, T, G, K], v [B, T, G, V], log_gate and beta [B, T, G], not {list(k_BTGK.shape)}, "
            f"{list(v_BTGV.shape)}, {list(log_gate_BTG.shape)} and {list(beta_BTG.shape)}."
        )
    B, T, G, K = k_BTGK.shape
    if T == 0:
        raise ValueError("gated_delta_rule_end_state needs at least one token: T is 0.")
    V = v_BTGV.shape[3]
    dtype = torch.float64 if k_BTGK.dtype == torch.float64 else torch.float32
    nothing_and_identity = torch.eye(K, V + K, dtype=dtype, device=k_BTGK.device).roll(V, dims=1)
    initial_state = nothing_and_identity.expand(B, G, K, V + K)
    values = torch.cat((v_BTGV, torch.zeros_like(k_BTGK)), dim=-1)
    final_state = chunk_final_state(k_BTGK, values, log_gate_BTG, beta_BTG, initial_state)
    state, transition = final_state.split([V, K], dim=-1)
    return state, transition
