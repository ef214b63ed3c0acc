"""The fast CPU form of the selective scan: segments of tokens, and a backward pass derived by hand.

The sequence is walked in segments whose states [S, B, D, N] fit the cache; within one,
:func:`~spikingbrain_train.ops.selective_scan.linear_scan.linear_scan` runs the recurrence. Saved for the
backward pass are the inputs and one state a segment: all states of a sequence are never there at once. No
exponential of a positive number is taken, so that any decay is exact, one that underflows to 0 included.

Shape legend: B batch, T time, S time of a segment, D channels, N state size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikingbrain_train.ops.selective_scan.linear_scan import linear_scan, linear_scan_gradients

# States of a segment, S * B * D * N: a few tensors of as many numbers are alive at once.
_SEGMENT_ELEMENTS = 1 << 20
_MIN_SEGMENT = 16  # a state a segment is kept: no more than D numbers a token at the usual N = 16
_MAX_SEGMENT = 1024


class _Segment(NamedTuple):
    """Time-major inputs of a segment in the state's dtype."""

    x_SBD: Tensor
    dt_SBD: Tensor
    A_DN: Tensor
    B_SBN: Tensor
    C_SBN: Tensor

    def decay(self) -> Tensor:
        """[S, B, D, N], each in [0, 1]."""
        return (self.dt_SBD.unsqueeze(-1) * self.A_DN).exp_()

    def update(self) -> Tensor:
        """[S, B, D, N]: what each token adds to the state."""
        return _outer(self.dt_SBD * self.x_SBD, self.B_SBN)


def _outer(x_SBD: Tensor, y_SBN: Tensor) -> Tensor:
    return x_SBD.unsqueeze(-1) * y_SBN.unsqueeze(2)


def _over_state(x_SBDN: Tensor, y_SBN: Tensor) -> Tensor:
    """[S, B, D]: a product over N, token by token."""
    return (x_SBDN @ y_SBN.unsqueeze(-1)).squeeze(-1)


def _over_channels(x_SBDN: Tensor, y_SBD: Tensor) -> Tensor:
    """[S, B, N]: a product over D, token by token."""
    return (y_SBD.unsqueeze(2) @ x_SBDN).squeeze(2)


def _bounds(x_BTD: Tensor, N: int) -> list[tuple[int, int]]:
    B, T, D = x_BTD.shape
    length = max(_MIN_SEGMENT, min(_MAX_SEGMENT, _SEGMENT_ELEMENTS // (B * D * N)))
    return [(start, min(start + length, T)) for start in range(0, T, length)]


def _segment(
    tensors: tuple[Tensor, ...], A_DN: Tensor, start: int, stop: int, dtype: torch.dtype
) -> _Segment:
    x, dt, B, C = (each[:, start:stop].transpose(0, 1).to(dtype).contiguous() for each in tensors)
    return _Segment(x, dt, A_DN.to(dtype), B, C)


class _ChunkSelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        state, before = initial_state, []
        for start, stop in _bounds(x, A.shape[1]):
            before.append(state)
            segment = _segment((x, dt, B, C), A, start, stop, state.dtype)
            states_SBDN = linear_scan(segment.decay(), segment.update(), state)
            y[:, start:stop] = _over_state(states_SBDN[1:], segment.C_SBN).transpose(0, 1)
            state = states_SBDN[-1].clone()  # a view would keep all states of the segment
        ctx.save_for_backward(x, dt, A, B, C, torch.stack(before))
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
        x, dt, A, B, C, before = ctx.saved_tensors
        grads = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in (x, dt, B, C)]
        dtype = before.dtype
        grad_A = torch.zeros_like(A, dtype=dtype)
        bounds = _bounds(x, A.shape[1])
        for (start, stop), state in zip(reversed(bounds), reversed(before.unbind(0)), strict=True):
            segment = _segment((x, dt, B, C), A, start, stop, dtype)
            grad_y_SBD = grad_y[:, start:stop].transpose(0, 1).to(dtype).contiguous()
            of_segment, of_A, grad_state = _segment_backward(segment, state, grad_y_SBD, grad_state)
            for grad, part in zip(grads, of_segment, strict=True):
                grad[:, start:stop] = part.transpose(0, 1)
            grad_A += of_A
        grad_x, grad_dt, grad_B, grad_C = grads
        return grad_x, grad_dt, grad_A.to(A.dtype), grad_B, grad_C, grad_state


def _segment_backward(
    segment: _Segment, state_BDN: Tensor, grad_y_SBD: Tensor, grad_state_BDN: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Gradients of x, dt, B and C, of A, and of the state before the segment."""
    x, dt, A, B, C = segment
    decay = segment.decay()
    states = linear_scan(decay, segment.update(), state_BDN)
    grad_states = linear_scan_gradients(decay, _outer(grad_y_SBD, C), grad_state_BDN)
    grad_C = _over_channels(states[1:], grad_y_SBD)
    grad_update = grad_states[1:]
    grad_dt_x = _over_state(grad_update, B)
    grad_B = _over_channels(grad_update, dt * x)
    grad_exponent = decay.mul_(grad_update).mul_(states[:-1])  # of dt * A
    grad_A = (grad_exponent * dt.unsqueeze(-1)).sum((0, 1))
    grad_dt = torch.addcmul(grad_exponent.mul_(A).sum(-1), x, grad_dt_x)
    return (dt * grad_dt_x, grad_dt, grad_B, grad_C), grad_A, grad_states[0].clone()


def chunk_selective_scan(
    x_BTD: Tensor, dt_BTD: Tensor, A_DN: Tensor, B_BTN: Tensor, C_BTN: Tensor, initial_state_BDN: Tensor
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] in x's dtype and final state [B, D, N]; gradients reach all six tensors."""
    return _ChunkSelectiveScan.apply(x_BTD, dt_BTD, A_DN, B_BTN, C_BTN, initial_state_BDN)
