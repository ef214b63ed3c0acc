"""A segment of gated linear attention whose decay inside a chunk is mild.

Everything follows from two factored operands. With ``b`` the sum of the log gates since the start of the
chunk, ``q~ = scale q exp(b)`` and ``k~ = k exp(-b)`` turn the chunk into plain linear attention: ``o =
tril(q~ k~^T) v + q~ S`` and ``S' = exp(b_end) (S + k~^T v)``. The caller makes sure that ``-b`` stays small
enough for ``exp(-b)``, in which case this costs two exponentials a gate and no more products than attention
without gates. The backward pass is derived by hand.

Products run in the dtype of q (bfloat16 operands are rounded once more, as on GPUs); states, cumulative sums
and the gradient of the log gate are kept in ``decay.dtype``: float32, or float64 for float64 inputs.

Shape legend: N chunks of C tokens, B batch, G groups, R heads of a group, K key dim, V value dim; M = N * B *
G.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikingbrain_train.ops.gated_linear_attention.chunk_states import scan_gradients, scan_states
from spikingbrain_train.ops.ordered_sums import cumulative_sum


class FactoredOperands(NamedTuple):
    """What both passes need: q~ and k~ and the gates they were made with."""

    q_NBGRCK: Tensor
    k_NBGCK: Tensor
    query_decay_NBGCK: Tensor
    inverse_decay_NBGCK: Tensor
    chunk_decay_NBGK1: Tensor


def factor(q_NBGRCK: Tensor, k_NBGCK: Tensor, decay_NBGCK: Tensor, scale: float) -> FactoredOperands:
    """Operands of one segment; q and k may be strided views.

    ``decay_NBGCK`` is ``exp(b)`` in the state dtype.
    """
    dtype = q_NBGRCK.dtype
    query_decay = (decay_NBGCK * scale).to(dtype)
    inverse_decay = decay_NBGCK.reciprocal().to(dtype)
    shape = q_NBGRCK.shape
    q = torch.mul(
        q_NBGRCK, query_decay.unsqueeze(3), out=torch.empty(shape, dtype=dtype, device=q_NBGRCK.device)
    )
    k = torch.mul(k_NBGCK, inverse_decay, out=torch.empty_like(inverse_decay))
    return FactoredOperands(q, k, query_decay, inverse_decay, decay_NBGCK[..., -1, :].unsqueeze(-1))


def _states(operands: FactoredOperands, v_MCV: Tensor, state_BGKV: Tensor) -> Tensor:
    """States before each chunk and after the last, [N + 1, B, G, K, V]."""
    N, B, G, C, K = operands.k_NBGCK.shape
    update = torch.bmm(operands.k_NBGCK.view(-1, C, K).transpose(1, 2), v_MCV)
    update = operands.chunk_decay_NBGK1 * update.view(N, B, G, K, -1)
    return scan_states(update, operands.chunk_decay_NBGK1, state_BGKV)


def _causal_products(rows_MRCD: Tensor, columns_MCD: Tensor) -> Tensor:
    """``tril(rows columns^T)`` with one C x C triangle a head: [M, R * C, C]."""
    M, R, C, D = rows_MRCD.shape
    products = torch.bmm(rows_MRCD.view(M, R * C, D), columns_MCD.transpose(1, 2))
    products.view(M * R, C, C).tril_()
    return products


def segment_forward(operands: FactoredOperands, v_NBGCV: Tensor, state_BGKV: Tensor) -> tuple[Tensor, Tensor]:
    """Output [N, B, G, R, C, V] in q's dtype and final state [B, G, K, V]."""
    N, B, G, R, C, K = operands.q_NBGRCK.shape
    M, V = N * B * G, v_NBGCV.shape[-1]
    v = v_NBGCV.reshape(M, C, V)
    q = operands.q_NBGRCK.view(M, R, C, K)
    states = _states(operands, v, state_BGKV)
    o = torch.bmm(_causal_products(q, operands.k_NBGCK.view(M, C, K)), v)
    o.baddbmm_(q.view(M, R * C, K), states[:-1].to(o.dtype).view(M, K, V))
    return o.view(N, B, G, R, C, V), states[-1]


class SegmentGradients(NamedTuple):
    """Gradients of one segment."""

    q_NBGRCK: Tensor
    k_NBGCK: Tensor
    v_NBGCV: Tensor
    log_gate_NBGCK: Tensor
    state_BGKV: Tensor


def segment_backward(
    operands: FactoredOperands,
    v_NBGCV: Tensor,
    state_BGKV: Tensor,
    grad_o_NBGRCV: Tensor,
    grad_state_BGKV: Tensor,
) -> SegmentGradients:
    """Gradients with respect to q, k, v, the log gate and the state before the segment.

    The log gate reaches the result only through ``b``: ``db = q~ * dq~ - k~ * dk~``, plus the decay of the
    whole chunk at its last token, and ``b`` is a cumulative sum inside the chunk.
    """
    N, B, G, R, C, K = operands.q_NBGRCK.shape
    M, V = N * B * G, v_NBGCV.shape[-1]
    dtype = operands.q_NBGRCK.dtype
    v = v_NBGCV.reshape(M, C, V)
    k = operands.k_NBGCK.view(M, C, K)
    q = operands.q_NBGRCK.view(M, R * C, K)
    grad_o = grad_o_NBGRCV.reshape(M, R * C, V)

    states = _states(operands, v, state_BGKV)
    through_output = torch.bmm(q.transpose(1, 2), grad_o).view(N, B, G, K, V).to(state_BGKV.dtype)
    grad_states = scan_gradients(through_output, operands.chunk_decay_NBGK1, grad_state_BGKV)
    grad_chunk_decay = (states[1:] * grad_states[1:]).sum(-1)
    # What k~^T v receives: it decays to the end of its chunk like the state that it joins.
    grad_update_MKV = (grad_states[1:] * operands.chunk_decay_NBGK1).to(dtype).view(M, K, V)

    products = _causal_products(q.view(M, R, C, K), k)
    grad_v = torch.bmm(products.transpose(1, 2), grad_o)
    grad_v.baddbmm_(k, grad_update_MKV)
    grad_products = _causal_products(grad_o.view(M, R, C, V), v)
    grad_q = torch.bmm(grad_products, k)
    grad_q.baddbmm_(grad_o, states[:-1].to(dtype).view(M, K, V).transpose(1, 2))
    grad_k = torch.bmm(grad_products.transpose(1, 2), q)
    grad_k.baddbmm_(v, grad_update_MKV.transpose(1, 2))

    grad_b = (q * grad_q).view(N, B, G, R, C, K).sum(3, dtype=state_BGKV.dtype)
    grad_b -= (k * grad_k).view(N, B, G, C, K)
    grad_b[..., -1, :] += grad_chunk_decay
    grad_log_gate = cumulative_sum(grad_b.flip(-2), -2).flip(-2)
    return SegmentGradients(
        grad_q.view(N, B, G, R, C, K).mul_(operands.query_decay_NBGCK.unsqueeze(3)),
        grad_k.view(N, B, G, C, K).mul_(operands.inverse_decay_NBGCK),
        grad_v.view(N, B, G, C, V),
        grad_log_gate,
        grad_states[0],
    )
