"""A segment of gated linear attention for any log gate in [-inf, 0]: every decay is a product of gates.

``A[i, j] = sum_k q[i, k] k[j, k] gate[j + 1, k] ... gate[i, k]`` for j < i is cut into squares: the one that
pairs the right half of a chunk with its left half, those of the two halves, and so on down to pairs of
neighbours. In a square the decay is that of the query since the boundary between the halves times that of
the key up to it. Blocks of twice the size get theirs from blocks of one size by one more product, so a chunk
costs one exponential a gate whatever its decay. Products of numbers in [0, 1] cannot overflow, lose no
precision next to a gate of exp(-50), and a gate of 0 makes no NaN.

The backward pass is derived by hand. The gradient of a log gate is the sum of what the squares that span its
token receive, collected from the whole chunk down to single tokens: sums only, so nothing cancels.

Products run in the dtype of q; decays, states and the gradient of the log gate are kept in the dtype of the
gates: float32, or float64 for float64 inputs.

Shape legend: N chunks of C tokens (a power of two), B batch, G groups, R heads of a group, K key dim, V value
dim; M = N * B * G; L = C / (2 h) blocks of two halves of h tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spikingbrain_train.ops.gated_linear_attention.chunk_states import scan_gradients, scan_states
from spikingbrain_train.ops.gated_linear_attention.factored import SegmentGradients


class _Level(NamedTuple):
    """Decays towards the boundary in the middle of every block."""

    query_MLhK: Tensor
    """Of the right half's queries since the boundary."""
    key_MLhK: Tensor
    """Of the left half's keys up to the boundary."""


class _Decays(NamedTuple):
    """All decays of a segment."""

    levels: list[_Level]
    """From halves of one token to halves of C / 2."""
    from_start_MCK: Tensor
    """Of a query since the start of its chunk."""
    to_end_MCK: Tensor
    """Of a key up to the end of its chunk."""


def _left(x: Tensor, half: int) -> Tensor:
    """[..., C, D] -> [..., L, h, D]"""
    return x.unflatten(-2, (-1, 2, half))[..., 0, :, :]


def _right(x: Tensor, half: int) -> Tensor:
    """[..., C, D] -> [..., L, h, D]"""
    return x.unflatten(-2, (-1, 2, half))[..., 1, :, :]


def _decays(gate_MCK: Tensor, dtype: torch.dtype) -> _Decays:
    """Gates are inclusive for queries (a state decays before a token reads it), exclusive for keys."""
    from_start, to_end = gate_MCK.clone(), torch.ones_like(gate_MCK)
    levels, half = [], 1
    while half < gate_MCK.shape[1]:
        query, key = _right(from_start, half), _left(to_end, half)
        levels.append(_Level(query.to(dtype, copy=True), key.to(dtype, copy=True)))
        left, right = (x(from_start, half)[..., -1:, :].clone() for x in (_left, _right))
        _right(from_start, half).mul_(left)
        _left(to_end, half).mul_(right)
        half *= 2
    return _Decays(levels, from_start, to_end)


def _squares(x_MRCC: Tensor, half: int) -> Tensor:
    """The squares of one level of a C x C matrix: a view [M, L, R, h, h]."""
    x = x_MRCC.unflatten(3, (-1, 2, half)).unflatten(2, (-1, 2, half))[:, :, :, 1, :, :, 0, :]
    return x.diagonal(dim1=2, dim2=4).permute(0, 4, 1, 2, 3)


class _Operands(NamedTuple):
    """Both factors of the squares of one level."""

    half: int
    level: _Level
    q_MLRhK: Tensor
    k_MLhK: Tensor


def _operands(q_MRCK: Tensor, k_MCK: Tensor, decays: _Decays) -> Iterator[_Operands]:
    for level in decays.levels:
        half = level.key_MLhK.shape[2]
        q_MLRhK = _right(q_MRCK, half).transpose(1, 2)
        q = torch.mul(q_MLRhK, level.query_MLhK.unsqueeze(2), out=q_MRCK.new_empty(q_MLRhK.shape))
        yield _Operands(half, level, q, _left(k_MCK, half) * level.key_MLhK)


def _write_scores(scores_MRCC: Tensor, operands: _Operands) -> None:
    M, L, R, half, K = operands.q_MLRhK.shape
    q, k = operands.q_MLRhK.view(M * L, R * half, K), operands.k_MLhK.view(M * L, half, K)
    _squares(scores_MRCC, half).copy_(torch.bmm(q, k.transpose(1, 2)).view(M, L, R, half, half))


def _diagonal_scores(q_MRCK: Tensor, k_MCK: Tensor) -> Tensor:
    """Scores of every token with itself, which has not decayed; zeros elsewhere: [M, R, C, C]."""
    return torch.diag_embed((q_MRCK * k_MCK.unsqueeze(1)).sum(-1))


def _chunks(x: Tensor) -> Tensor:
    """[N, B, G, ...] -> [M, ...], contiguous."""
    return x.flatten(0, 2).contiguous()


def segment_forward(
    q_NBGRCK: Tensor, k_NBGCK: Tensor, v_NBGCV: Tensor, log_gate_NBGCK: Tensor, state_BGKV: Tensor
) -> tuple[Tensor, Tensor]:
    """Output [N, B, G, R, C, V] in q's dtype and final state [B, G, K, V]; q is already scaled."""
    N, B, G, R, C, K = q_NBGRCK.shape
    M, V = N * B * G, v_NBGCV.shape[-1]
    q, k, v = _chunks(q_NBGRCK), _chunks(k_NBGCK), _chunks(v_NBGCV)
    decays = _decays(_chunks(log_gate_NBGCK).exp(), q.dtype)
    scores = _diagonal_scores(q, k)
    for operands in _operands(q, k, decays):
        _write_scores(scores, operands)
    states = _states(k, v, decays, state_BGKV, N)
    o = torch.bmm(scores.view(M, R * C, C), v)
    q_from_start = q * decays.from_start_MCK.to(q.dtype).unsqueeze(1)
    o.baddbmm_(q_from_start.view(M, R * C, K), states[:-1].to(o.dtype).view(M, K, V))
    return o.view(N, B, G, R, C, V), states[-1]


def _chunk_decay(decays: _Decays, state_BGKV: Tensor, num_chunks: int) -> Tensor:
    """[N, B, G, K, 1]"""
    return decays.from_start_MCK[:, -1].reshape(num_chunks, *state_BGKV.shape[:3], 1)


def _states(k_MCK: Tensor, v_MCV: Tensor, decays: _Decays, state_BGKV: Tensor, num_chunks: int) -> Tensor:
    k_to_end = k_MCK * decays.to_end_MCK.to(k_MCK.dtype)
    update = torch.bmm(k_to_end.transpose(1, 2), v_MCV).to(state_BGKV.dtype)
    chunk_decay = _chunk_decay(decays, state_BGKV, num_chunks)
    return scan_states(update.view(num_chunks, *state_BGKV.shape), chunk_decay, state_BGKV)


def segment_backward(
    q_NBGRCK: Tensor,
    k_NBGCK: Tensor,
    v_NBGCV: Tensor,
    log_gate_NBGCK: Tensor,
    state_BGKV: Tensor,
    grad_o_NBGRCV: Tensor,
    grad_state_BGKV: Tensor,
) -> SegmentGradients:
    """Gradients with respect to the scaled q, k, v, the log gate and the state before the segment.

    Those of q, k and v are in their dtype.
    """
    N, B, G, R, C, K = q_NBGRCK.shape
    M, V = N * B * G, v_NBGCV.shape[-1]
    q, k, v = _chunks(q_NBGRCK), _chunks(k_NBGCK), _chunks(v_NBGCV)
    grad_o = grad_o_NBGRCV.reshape(M, R * C, V)
    decays = _decays(_chunks(log_gate_NBGCK).exp(), q.dtype)

    # Through the states.
    dtype, state_dtype = q.dtype, state_BGKV.dtype
    query_decay = decays.from_start_MCK.to(dtype).unsqueeze(1)
    key_decay = decays.to_end_MCK.to(dtype)
    states = _states(k, v, decays, state_BGKV, N)
    chunk_decay = _chunk_decay(decays, state_BGKV, N)
    q_from_start = (q * query_decay).view(M, R * C, K)
    through_output = torch.bmm(q_from_start.transpose(1, 2), grad_o).view(N, B, G, K, V).to(state_dtype)
    grad_states = scan_gradients(through_output, chunk_decay, grad_state_BGKV)
    grad_update = grad_states[1:].to(dtype).view(M, K, V)
    k_to_end = k * key_decay
    grad_q = torch.bmm(grad_o, states[:-1].to(dtype).view(M, K, V).transpose(1, 2))
    grad_k = torch.bmm(v, grad_update.transpose(1, 2))
    grad_v = torch.bmm(k_to_end, grad_update)
    # Gradients of the sums of log gates from the start of a chunk and to its end.
    grad_from_start = (q_from_start * grad_q).view(M, R, C, K).sum(1, dtype=state_dtype)
    grad_from_start[:, -1] += (grad_states[1:] * states[:-1]).sum(-1).mul_(chunk_decay.squeeze(-1)).view(M, K)
    grad_to_end = (k_to_end * grad_k).to(state_dtype)
    grad_q = grad_q.view(M, R, C, K).mul_(query_decay)
    grad_k.mul_(key_decay)

    # Through the scores.
    scores = _diagonal_scores(q, k)
    grad_scores = torch.bmm(grad_o, v.transpose(1, 2)).view(M, R, C, C)
    grad_diagonal = grad_scores.diagonal(dim1=2, dim2=3).unsqueeze(-1)
    grad_q.addcmul_(grad_diagonal, k.unsqueeze(1))
    grad_k += (grad_diagonal * q).sum(1)
    grad_levels = []
    for operands in _operands(q, k, decays):
        _write_scores(scores, operands)
        grad_levels.append(_level_backward(operands, grad_scores, grad_q, grad_k, state_dtype))
    grad_v.baddbmm_(scores.view(M, R * C, C).transpose(1, 2), grad_o)

    _collect(grad_from_start, grad_to_end, grad_levels)
    return SegmentGradients(
        grad_q.view(N, B, G, R, C, K),
        grad_k.view(N, B, G, C, K),
        grad_v.view(N, B, G, C, V),
        grad_from_start.view(N, B, G, C, K),
        grad_states[0],
    )


def _level_backward(
    operands: _Operands,
    grad_scores_MRCC: Tensor,
    grad_q_MRCK: Tensor,
    grad_k_MCK: Tensor,
    sum_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Add one level's share to the gradients of q and k; return those of the logarithms of its decays."""
    half, level, q_MLRhK, k_MLhK = operands
    M, L, R, _, K = q_MLRhK.shape
    grad_squares = _squares(grad_scores_MRCC, half).reshape(M * L, R * half, half)
    grad_q = torch.bmm(grad_squares, k_MLhK.view(M * L, half, K)).view(M, L, R, half, K)
    grad_k = torch.bmm(grad_squares.transpose(1, 2), q_MLRhK.view(M * L, R * half, K)).view(M, L, half, K)
    _right(grad_q_MRCK, half).addcmul_(grad_q.transpose(1, 2), level.query_MLhK.unsqueeze(1))
    _left(grad_k_MCK, half).addcmul_(grad_k, level.key_MLhK)
    return grad_q.mul_(q_MLRhK).sum(2, dtype=sum_dtype), grad_k.mul_(k_MLhK)


def _collect(
    grad_from_start_MCK: Tensor, grad_to_end_MCK: Tensor, grad_levels: list[tuple[Tensor, Tensor]]
) -> None:
    """Turn the gradient of the sums from the start of each chunk into that of the log gates, in place.

    From blocks of 2 h tokens to blocks of h: in the right half, the sum from the start is that of the half
    plus the whole left half; in the left half, the sum to the end is that of the half plus the whole right
    half; and a whole half is the sum from its start at its last token.
    """
    for grad_query, grad_key in reversed(grad_levels):
        half = grad_key.shape[2]
        left, right = (x(grad_from_start_MCK, half) for x in (_left, _right))
        through_left, through_right = right.sum(2), _left(grad_to_end_MCK, half).sum(2)
        left[:, :, -1] += through_left
        right[:, :, -1] += through_right
        right += grad_query
        _left(grad_to_end_MCK, half).add_(grad_key)
