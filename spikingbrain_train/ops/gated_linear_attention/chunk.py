"""The fast CPU form of gated linear attention: chunks in parallel, states in sequence.

Its backward pass is derived by hand. The sequence is walked in segments that fit the cache. Inside a segment,
chunks of tokens attend to themselves and read the state before them. How the decay inside a chunk is applied
depends on how strong it is, segment by segment: ``factored`` (fastest) in the longest chunks for which
``exp(-b)`` is harmless, ``subdivided`` (any log gate in [-inf, 0], as in the 76B's tied gates) where even the
shortest are too long; all compute the same recurrence. Saved for the backward pass: the inputs and one state
a segment.

Shape legend: B batch, T time, H query heads, G key/value groups, R = H // G, K key dim, V value dim; N chunks
of C tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spikingbrain_train.ops.gated_linear_attention import factored, subdivided
from spikingbrain_train.ops.ordered_sums import cumulative_sum

# Lengths of chunks, each twice the one before: long ones cost fewer states, short ones stand more decay.
_CHUNKS = (16, 32, 64)
_MIN_CHUNK = 8
# Segments of this many query elements (T * B * H * K) keep the operands of one segment in the last-level
# cache.
_SEGMENT_ELEMENTS = 1 << 20
# exp(40) leaves room for products with float32 and bfloat16 operands, and exp(-40) is far from their
# underflow.
_MAX_FACTORED_DECAY = 40.0
# The factored gradient of a log gate is a difference of terms of which the true value may be the share
# exp(log gate).
_MAX_FACTORED_STEP = 5.0


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 has too few exponent bits for the factors of a chunk: it is computed in float32."""
    return torch.float32 if dtype == torch.float16 else dtype


class _Segment:
    """Chunked views of the inputs between two times.

    They are padded to whole chunks with tokens that change nothing.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, start: int, stop: int, chunk: int
    ) -> None:
        self.start, self.stop = start, stop
        self.num_chunks = -(-(stop - start) // chunk)
        self.chunk = chunk
        self.heads_per_group = q.shape[2] // k.shape[2]
        self.dtype = _compute_dtype(q.dtype)
        self.state_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.q = self.split_heads(q)
        self.k, self.v = self.split_groups(k), self.split_groups(v)
        self.log_gate = self.split_groups(log_gate, self.state_dtype).contiguous()

    def _split_time(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[B, T, heads, D] -> [B, N, C, heads, D]"""
        x = x[:, self.start : self.stop].to(dtype or self.dtype)
        padding = self.num_chunks * self.chunk - x.shape[1]
        if padding:
            x = F.pad(x, (0, 0, 0, 0, 0, padding))
        return x.unflatten(1, (self.num_chunks, self.chunk))

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, T, H, D] -> [N, B, G, R, C, D]"""
        return self._split_time(x).unflatten(3, (-1, self.heads_per_group)).permute(1, 0, 3, 4, 2, 5)

    def split_groups(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[B, T, G, D] -> [N, B, G, C, D]"""
        return self._split_time(x, dtype).permute(1, 0, 3, 2, 4)

    def write_heads(self, target_BTHD: Tensor, x_NBGRCD: Tensor) -> None:
        """Put this segment's x back where split_heads took it from."""
        x = x_NBGRCD.permute(1, 0, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)
        target_BTHD[:, self.start : self.stop].copy_(x[:, : self.stop - self.start])

    def write_groups(self, target_BTGD: Tensor, x_NBGCD: Tensor) -> None:
        """Put this segment's x back where split_groups took it from."""
        x = x_NBGCD.permute(1, 0, 3, 2, 4).flatten(1, 2)
        target_BTGD[:, self.start : self.stop].copy_(x[:, : self.stop - self.start])

    def factored_operands(self, scale: float) -> factored.FactoredOperands:
        """Operands of the factored form; the decay inside every chunk must be mild enough for it."""
        # exp2 is vectorised for every dtype; exp in float32 may go through a slower library call.
        b_log2 = cumulative_sum(self.log_gate * math.log2(math.e), dim=-2)
        return factored.factor(self.q, self.k, b_log2.exp2_(), scale)

    def subdivided_inputs(self, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scaled q, k, v and log gate, for the form that takes any gate."""
        return self.q * scale, self.k, self.v, self.log_gate


def _factored_chunk(log_gate_BTGK: Tensor, longest: int) -> int | None:
    """The longest chunk, up to ``longest``, in which no channel decays too far for the factored form.

    None where one does in the shortest.
    """
    # The conditions are written so that NaN gates fail them.
    if not log_gate_BTGK.min().item() >= -_MAX_FACTORED_STEP:
        return None
    shortest = min(longest, _CHUNKS[0])
    padding = -log_gate_BTGK.shape[1] % longest
    decay = F.pad(log_gate_BTGK, (0, 0, 0, 0, 0, padding)) if padding else log_gate_BTGK
    decay = decay.unflatten(1, (-1, shortest)).sum(2)
    fitting, chunk = None, shortest
    while decay.min().item() >= -_MAX_FACTORED_DECAY:
        fitting = chunk
        if chunk == longest:
            break
        chunk *= 2
        decay = decay.unflatten(1, (-1, 2)).sum(2)
    return fitting


def _segment_bounds(q_BTHK: Tensor, chunk: int) -> list[tuple[int, int]]:
    B, T, H, K = q_BTHK.shape
    length = max(chunk, _SEGMENT_ELEMENTS // (B * H * K) // chunk * chunk)
    return [(start, min(start + length, T)) for start in range(0, T, length)]


def _chunk_size(T: int) -> int:
    return min(_CHUNKS[-1], max(_MIN_CHUNK, 1 << (T - 1).bit_length()))


class _ChunkGatedLinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, initial_state: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        o = q.new_empty(*q.shape[:3], v.shape[-1])
        state, states = initial_state, []
        chunk = _chunk_size(q.shape[1])
        for start, stop in _segment_bounds(q, chunk):
            states.append(state)
            factored_chunk = _factored_chunk(log_gate[:, start:stop], chunk)
            segment = _Segment(q, k, v, log_gate, start, stop, factored_chunk or chunk)
            if factored_chunk is None:
                o_segment, state = subdivided.segment_forward(*segment.subdivided_inputs(scale), state)
            else:
                operands = segment.factored_operands(scale)
                o_segment, state = factored.segment_forward(operands, segment.v, state)
            segment.write_heads(o, o_segment)
        ctx.save_for_backward(q, k, v, log_gate, torch.stack(states))
        ctx.scale = scale
        return o, state.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_gate, states = ctx.saved_tensors
        scale, chunk = ctx.scale, _chunk_size(q.shape[1])
        grad_q, grad_k, grad_v = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)
        )
        grad_log_gate = torch.empty_like(log_gate, memory_format=torch.contiguous_format)
        bounds = _segment_bounds(q, chunk)
        for (start, stop), state in zip(reversed(bounds), reversed(states.unbind(0)), strict=True):
            factored_chunk = _factored_chunk(log_gate[:, start:stop], chunk)
            segment = _Segment(q, k, v, log_gate, start, stop, factored_chunk or chunk)
            grad_o_segment = segment.split_heads(grad_o)
            if factored_chunk is None:
                grads = _subdivided_backward(segment, scale, state, grad_o_segment, grad_state)
            else:
                operands = segment.factored_operands(scale)
                grads = factored.segment_backward(operands, segment.v, state, grad_o_segment, grad_state)
            segment.write_heads(grad_q, grads.q_NBGRCK)
            segment.write_groups(grad_k, grads.k_NBGCK)
            segment.write_groups(grad_v, grads.v_NBGCV)
            segment.write_groups(grad_log_gate, grads.log_gate_NBGCK)
            grad_state = grads.state_BGKV
        return grad_q, grad_k, grad_v, grad_log_gate, grad_state, None


def _subdivided_backward(
    segment: _Segment, scale: float, state: Tensor, grad_o: Tensor, grad_state: Tensor
) -> factored.SegmentGradients:
    """Gradients of one segment with respect to unscaled q."""
    inputs = segment.subdivided_inputs(scale)
    grads = subdivided.segment_backward(*inputs, state, grad_o, grad_state)
    return grads._replace(q_NBGRCK=grads.q_NBGRCK * scale)


def chunk_gated_linear_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_gate_BTGK: Tensor,
    initial_state_BGKV: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] in q's dtype and final state [B, G, K, V]; gradients reach all five tensors."""
    return _ChunkGatedLinearAttention.apply(q_BTHK, k_BTGK, v_BTGV, log_gate_BTGK, initial_state_BGKV, scale)
