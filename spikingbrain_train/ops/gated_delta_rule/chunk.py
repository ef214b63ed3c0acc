"""The fast form of the gated delta rule in PyTorch: chunks in parallel, states in sequence.

Inside a chunk of C tokens the corrections of all tokens are the solution of one triangular system (the WY
representation and UT transform of arXiv 2412.06464, section 3.3, after arXiv 2406.06484)::

    D_ij = exp(sum of the log gates behind token j up to token i)          for j <= i, else 0
    A    = strictly lower part of diag(beta) (K K^T * D)
    [U W] = (I + A)^-1 diag(beta) [V  diag(d) K]                           d_i = decay from before the chunk
    V'   = U - W S                                                         corrections, for the state S before
    O    = scale (diag(d) Q S + (Q K^T * D) V')
    S   <- d_C S + (diag(D_C) K)^T V'

Every decay is the exponential of a sum of log gates, none of a difference of such sums: nothing overflows, a
gate of -50 costs its neighbours no digits, and one of -inf forgets all that was before it.

The sequence is walked in segments. Saved for the backward pass: the inputs and one state a segment; it
computes each segment again and has autograd differentiate that.

Shape legend: B batch, T time, H query heads, G key/value groups, R = H // G, K key dim, V value dim; N chunks
of C tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spikingbrain_train.ops.gated_delta_rule.unit_lower import solve_unit_lower
from spikingbrain_train.ops.ordered_sums import cumulative_sum

_CHUNK = 64
_SHORTEST_CHUNK = 8
# Segments of this many elements of one operand (T * B * heads * width): what autograd keeps of one segment in
# the backward pass stays at some ten times 1 MiB, whatever the length of the text, and in the caches.
_SEGMENT_ELEMENTS = 1 << 18


def chunk_gated_delta_rule(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_gate_BTG: Tensor,
    beta_BTG: Tensor,
    initial_state_BGKV: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] in q's dtype and final state [B, G, K, V]; gradients reach all six tensors.

    16-bit tensors are computed in float32, the dtype of the state.
    """
    inputs = (q_BTHK, k_BTGK, v_BTGV, log_gate_BTG, beta_BTG)
    return _ChunkGatedDeltaRule.apply(*inputs, initial_state_BGKV, scale)


def chunk_final_state(
    k_BTGK: Tensor, v_BTGV: Tensor, log_gate_BTG: Tensor, beta_BTG: Tensor, initial_state_BGKV: Tensor
) -> Tensor:
    """The final state alone, without the products of queries; differentiable in the same way."""
    inputs = (None, k_BTGK, v_BTGV, log_gate_BTG, beta_BTG)
    return _ChunkGatedDeltaRule.apply(*inputs, initial_state_BGKV, 1.0)[1]


class _ChunkGatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        log_gate: Tensor,
        beta: Tensor,
        initial_state: Tensor,
        scale: float,
    ) -> tuple[Tensor | None, Tensor]:
        o = None if q is None else q.new_empty(*q.shape[:3], v.shape[-1])
        inputs = (q, k, v, log_gate, beta)
        state, states = initial_state, []
        for start, stop in _segment_bounds(q, k, v):
            states.append(state)
            o_segment, state = _segment(_between(inputs, start, stop), state, scale)
            if o is not None and o_segment is not None:
                o[:, start:stop] = o_segment
        ctx.save_for_backward(*inputs, torch.stack(states))
        ctx.scale = scale
        return o, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor | None, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, states = ctx.saved_tensors
        bounds = _segment_bounds(*inputs[:3])
        gradients = [None if x is None else torch.empty_like(x) for x in inputs]
        for (start, stop), state in zip(reversed(bounds), reversed(states.unbind(0)), strict=True):
            leaves = [
                None if x is None else x.detach().requires_grad_()
                for x in (*_between(inputs, start, stop), state)
            ]
            with torch.enable_grad():
                o_segment, final = _segment(leaves[:-1], leaves[-1], ctx.scale)
            outputs, grads = [final], [grad_state]
            if o_segment is not None and grad_o is not None:
                outputs.append(o_segment)
                grads.append(grad_o[:, start:stop])
            *of_inputs, grad_state = torch.autograd.grad(outputs, [x for x in leaves if x is not None], grads)
            given = iter(of_inputs)
            for gradient in gradients:
                if gradient is not None:
                    gradient[:, start:stop] = next(given)
        return *gradients, grad_state, None


def _segment_bounds(q: Tensor | None, k: Tensor, v: Tensor) -> list[tuple[int, int]]:
    T = k.shape[1]
    elements = max(x[:, :1].numel() for x in (q, k, v) if x is not None)
    length = max(1, _SEGMENT_ELEMENTS // (elements * _CHUNK)) * _CHUNK
    return [(start, min(start + length, T)) for start in range(0, T, length)]


def _between(inputs: Any, start: int, stop: int) -> list[Tensor | None]:
    return [None if x is None else x[:, start:stop] for x in inputs]


def _segment(
    inputs: list[Tensor | None], state_BGKV: Tensor | None, scale: float
) -> tuple[Tensor | None, Tensor]:
    """Output [B, T, H, V], None without q, and state behind a segment, in operations that autograd knows."""
    q_BTHK, k_BTGK, v_BTGV, log_gate_BTG, beta_BTG = inputs
    assert k_BTGK is not None and v_BTGV is not None and log_gate_BTG is not None and beta_BTG is not None
    assert state_BGKV is not None
    T, (K, V), dtype = k_BTGK.shape[1], state_BGKV.shape[2:], state_BGKV.dtype
    chunk = min(_CHUNK, max(_SHORTEST_CHUNK, 1 << (T - 1).bit_length()))
    k, v = (_chunked(x, chunk, dtype) for x in (k_BTGK, v_BTGV))
    log_gate, beta = (_chunked(x.unsqueeze(-1), chunk, dtype).squeeze(-1) for x in (log_gate_BTG, beta_BTG))
    decay_NBGCC = _Decays.apply(log_gate)
    from_start_NBGC1 = cumulative_sum(log_gate, -1).exp().unsqueeze(-1)

    beta_NBGC1 = beta.unsqueeze(-1)
    written = k * beta_NBGC1
    # What stands on the diagonal is left out there.
    A = written @ k.transpose(-1, -2) * decay_NBGCC
    right = torch.cat((v * beta_NBGC1, written * from_start_NBGC1), dim=-1)
    u, w = solve_unit_lower(A, right).split([V, K], dim=-1)

    k_to_end_NBGKC = (k * decay_NBGCC[..., -1, :, None]).transpose(-1, -2)
    whole_NBG11 = from_start_NBGC1[..., -1:, :]
    states, corrections = [], []
    for u_n, w_n, k_n, whole_n in zip(
        u.unbind(0), w.unbind(0), k_to_end_NBGKC.unbind(0), whole_NBG11.unbind(0), strict=True
    ):
        correction = u_n - w_n @ state_BGKV
        states.append(state_BGKV)
        corrections.append(correction)
        state_BGKV = state_BGKV * whole_n + k_n @ correction
    if q_BTHK is None:
        return None, state_BGKV

    G, heads = k_BTGK.shape[2], q_BTHK.shape[2]
    q_NBGRCK = _chunked(q_BTHK, chunk, dtype).unflatten(2, (G, heads // G)) * scale
    within = q_NBGRCK @ k.unsqueeze(3).transpose(-1, -2) * decay_NBGCC.unsqueeze(3)
    before = q_NBGRCK * from_start_NBGC1.unsqueeze(3)
    o_NBGRCV = before @ torch.stack(states).unsqueeze(3) + within @ torch.stack(corrections).unsqueeze(3)
    o_BTHV = o_NBGRCV.flatten(2, 3).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T]
    return o_BTHV.to(q_BTHK.dtype), state_BGKV


def _chunked(x_BTGD: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """[N, B, G, C, D] in this order, padded to whole chunks with zeros, which neither write nor fade."""
    padding = -x_BTGD.shape[1] % chunk
    x = F.pad(x_BTGD.to(dtype), (0, 0, 0, 0, 0, padding)) if padding else x_BTGD.to(dtype)
    return x.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4).contiguous()


class _Decays(torch.autograd.Function):
    """D [N, B, G, C, C]: how much of what token j wrote is left at token i, 0 before it is written.

    Its own backward pass keeps D alone and goes over it twice; autograd goes over six tensors of that size.
    """

    @staticmethod
    def forward(ctx: Any, log_gate_NBGC: Tensor) -> Tensor:
        C = log_gate_NBGC.shape[-1]
        before = torch.ones(C, C, dtype=torch.bool, device=log_gate_NBGC.device).triu(1)
        # Down a column of token j only the gates behind j are summed.
        behind = log_gate_NBGC.unsqueeze(-1).masked_fill(~before.t(), 0.0)
        decay_NBGCC = cumulative_sum(behind, -2).exp_().masked_fill_(before, 0.0)
        ctx.save_for_backward(decay_NBGCC)
        return decay_NBGCC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NBGCC: Tensor) -> Tensor:
        (decay_NBGCC,) = ctx.saved_tensors
        # Gate m stands in the sums of rows i >= m and columns j < m. Nothing is subtracted: what a strong
        # gate leaves is far below what stands on the diagonal.
        up_to_column = cumulative_sum(grad_NBGCC * decay_NBGCC, -1)
        return F.pad(up_to_column.tril_(-1).sum(-2)[..., :-1], (1, 0))
