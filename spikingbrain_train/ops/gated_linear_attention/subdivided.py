"""A segment of gated linear attention whose decay inside a chunk is too strong to be factored in one piece.

``A[i, j] = sum_k q[i, k] k[j, k] exp(g[j+1] + ... + g[i])`` is split until nothing can overflow: the square
below the diagonal that pairs the right half of a block with its left half is factored at the boundary between
them, so both exponents are sums of log gates and never positive; the two halves are split again, down to
blocks of ``_LEAF`` tokens that use every pairwise sum. Sums run outwards from the boundary and are never
differences of long cumulative sums, so neither a log gate of -50 a step nor one of -inf costs precision
elsewhere.

Written with differentiable tensor operations: the backward pass is autograd's, and as each exponent is a sum
of its own, the gradient of the log gate has no cancelling terms either.

Shape legend: N chunks of C tokens, B batch, G groups, R heads of a group, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain_train.ops.gated_linear_attention.decay import sum_from_start, sum_to_end

_LEAF = 8


def _leaf_output(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> Tensor:
    """Exact attention inside blocks of a few tokens: q [..., R, C, K], k and log_gate [..., 1, C, K], v [...,
    1, C, V]."""
    C = q.shape[-2]
    causal = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    strictly_before = causal.tril(-1).unsqueeze(-1)
    sums_IJK = log_gate.unsqueeze(-2).masked_fill(~strictly_before, 0.0).cumsum(-3)
    decayed_k_IJK = sums_IJK.exp() * k.unsqueeze(-3)
    # One small product for every query token i, with the heads of a group as its rows: [..., I, R, K] x [...,
    # I, K, J].
    scores = q.transpose(-3, -2) @ decayed_k_IJK.squeeze(-4).transpose(-1, -2)
    return scores.transpose(-3, -2).masked_fill(~causal, 0.0) @ v


def _intra_chunk_output(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> Tensor:
    """Attention of each chunk to itself, by halving: q [..., R, C, K], k and log_gate [..., 1, C, K], v [...,
    1, C, V]."""
    C = q.shape[-2]
    if C <= _LEAF:
        return _leaf_output(q, k, v, log_gate)
    half = C // 2

    def split(x: Tensor) -> Tensor:
        """[..., rows, C, D] -> [..., 2, rows, C / 2, D]"""
        return x.unflatten(-2, (2, half)).transpose(-4, -3)

    q, k, v, log_gate = split(q), split(k), split(v), split(log_gate)
    right_q = q[..., 1, :, :, :] * sum_from_start(log_gate[..., 1, :, :, :], dim=-2).exp()
    left_k = k[..., 0, :, :, :] * sum_to_end(log_gate[..., 0, :, :, :], dim=-2).exp()
    right_o = right_q @ left_k.transpose(-1, -2) @ v[..., 0, :, :, :]
    o = _intra_chunk_output(q, k, v, log_gate) + torch.stack((torch.zeros_like(right_o), right_o), dim=-4)
    return o.transpose(-4, -3).flatten(-3, -2)


def segment_forward(
    q_NBGRCK: Tensor, k_NBGCK: Tensor, v_NBGCV: Tensor, log_gate_NBGCK: Tensor, state_BGKV: Tensor
) -> tuple[Tensor, Tensor]:
    """Differentiable output [N, B, G, R, C, V] and final state [B, G, K, V]; q is already scaled, all in one
    dtype."""
    to_end = sum_to_end(log_gate_NBGCK, dim=-2)
    from_start = sum_from_start(log_gate_NBGCK, dim=-2)
    updates = (k_NBGCK * to_end.exp()).transpose(-1, -2) @ v_NBGCV
    decays = from_start[..., -1, :].exp().unsqueeze(-1)
    states = []
    for update, decay in zip(updates.unbind(0), decays.unbind(0), strict=True):
        states.append(state_BGKV)
        state_BGKV = torch.addcmul(update, state_BGKV, decay)
    k, v, log_gate = (x.unsqueeze(-3) for x in (k_NBGCK, v_NBGCV, log_gate_NBGCK))
    inter = (q_NBGRCK * from_start.exp().unsqueeze(-3)) @ torch.stack(states).unsqueeze(-3)
    return inter + _intra_chunk_output(q_NBGRCK, k, v, log_gate), state_BGKV
