"""INT8 inputs of linears, with a scale for each token (BitNet b1.58, arXiv 2402.17764, section 2).

Of a token x [D], the whole input of a projection:

    scale = max |x| / 127, with max |x| at least 1e-5
    code = round(x / scale)          (half to even, -127 .. 127)
    y = code * scale

The gradient is straight-through. All is computed in float32 (float64 for float64 inputs) and y rounded once,
to x's dtype. An input that is split over ranks needs the largest magnitude of each token over all of them.

Shape letters: D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LARGEST_CODE = 127
_SMALLEST_MAXIMUM = 1e-5
"""Of a token of zeros, whose codes are 0 at any scale; as in the published training code."""


def largest_magnitudes(x: Tensor) -> Tensor:
    """[..., 1] in x's dtype: max |x| of each token, or of a part of its channels, without a gradient."""
    return x.detach().abs().amax(-1, keepdim=True)


def codes_per_unit(largest: Tensor) -> Tensor:
    """How many steps make a distance of 1, the reciprocal of a token's scale.

    Args:
        largest: [..., 1] max |x| of whole tokens.

    Returns:
        The same shape, float32 (float64 for float64 numbers).
    """
    exact = largest.to(torch.float64 if largest.dtype == torch.float64 else torch.float32)
    return LARGEST_CODE / exact.clamp(min=_SMALLEST_MAXIMUM)


def int8_token_codes(x: Tensor, per_unit: Tensor) -> Tensor:
    """Whole numbers from -127 to 127 that times their token's scale are next to x, without a gradient.

    Args:
        x: [..., D] floating point, or a part of the channels.
        per_unit: [..., 1] of whole tokens, see :func:`codes_per_unit`.

    Returns:
        [..., D] in the dtype of ``per_unit``; ``.to(torch.int8)`` changes no value.
    """
    return (x.detach().to(per_unit.dtype) * per_unit).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)


def int8_token_rounding(x: Tensor, per_unit: Tensor) -> Tensor:
    """x as INT8 numbers hold it; the gradient with respect to x is the identity.

    Args:
        x: [..., D] floating point, or a part of the channels.
        per_unit: [..., 1] of whole tokens, see :func:`codes_per_unit`.
    """
    return _StraightThrough.apply(x, per_unit)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, per_unit: Tensor) -> Tensor:
        return int8_token_codes(x, per_unit).div_(per_unit).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None
