"""INT8 inputs of linears with a scale for each block of neighbours, as llama.cpp's CPU products round them.

Blocks of S = 256 are ggml's Q8_K (``quantize_row_q8_K_ref``, ggml/src/ggml-quants.c), which meets TQ2_0 and
TQ1_0; of S = 32 its Q8_0 as x86 computes it (``quantize_row_q8_0``, ggml/src/ggml-cpu/arch/x86/quants.c),
which meets Q4_0 and Q2_0. Of a block x [S]:

    per_unit = 127 / max |x|
    code     = round(x * per_unit)          (half to even, -127 .. 127)
    scale    = 1 / per_unit                 (Q8_K, float32)
             = float16(max |x| / 127)       (Q8_0: codes are made before it is rounded)
    y        = code * scale

llama.cpp's Q8_K has both, codes and scale, with the sign of the block's largest number turned round; their
product is the same. The gradient is straight-through. All is computed in float32 (float64 for float64 inputs)
and y rounded once, to x's dtype. float16 holds no scale above 65504, that of inputs of 8.3e6: llama.cpp
computes infinities there, and here the scale is the largest that float16 has.

Shape letters: N blocks, S inputs of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LARGEST_CODE = 127
_SMALLEST_MAXIMUM = 1e-30
"""Below it a block is as good as zeros, and 127 / max would leave float32."""
_HALF_SCALES = 32
"""Inputs of the blocks whose scales are float16."""


def int8_block_codes(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 that times their block's scale are next to x, without a gradient.

    Args:
        x: [..., N * S] floating point.
        size: S, 256 or 32.

    Returns:
        Codes [..., N, S], and scales [..., N, 1]; both float32 (float64 for float64 numbers).
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    blocks = x.detach().to(exact).unflatten(-1, (-1, size))
    largest = blocks.abs().amax(-1, keepdim=True)
    # A Python number over a tensor is that times a reciprocal in torch: rounded twice.
    per_unit = largest.new_full((), LARGEST_CODE) / largest.clamp(min=_SMALLEST_MAXIMUM)
    codes = (blocks * per_unit).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
    if size != _HALF_SCALES:
        return codes, per_unit.reciprocal()
    half = (largest / LARGEST_CODE).clamp(max=torch.finfo(torch.float16).max).to(torch.float16)
    return codes, half.to(exact)


def int8_block_rounding(x: Tensor, size: int) -> Tensor:
    """x as INT8 numbers of blocks hold it; the gradient with respect to x is the identity.

    Args:
        x: [..., N * S] floating point.
        size: S, 256 or 32.
    """
    return _StraightThrough.apply(x, size)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        codes, scales = int8_block_codes(x, size)
        return codes.mul_(scales).flatten(-2).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None
