"""INT8 numbers that share a scale in groups: weights along their input, keys and values over a head.

Of a group of weights w [..., S]:

    scale = max |w| / 127, rounded up to bfloat16     (so that nothing is cut off; there is no zero point)
    code = round(w / scale)                           (half to even, -127 .. 127)
    y = code * scale

as the W8ASpike form of SpikingBrain (arXiv 2509.05276, section 3.3) has them, in groups of 128 along the
input. A scale of eight binary digits is the same number in float32 and bfloat16, so a model is the same in
whichever of them it is loaded. Codes are computed in float32 (float64 for float64 numbers), and y is rounded
once, to w's dtype. Keys and values are not stored: their scale is max |x| / 127 as it is, within the bounds
of the published inference code.

Shape letters: O outputs, I inputs, N groups of a row, S numbers of a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LARGEST_CODE = 127
DEFAULT_GROUP_SIZE = 128
"""Of the published W8ASpike form."""
_SMALLEST_SCALE = torch.finfo(torch.bfloat16).tiny
"""Of a group of zeros, whose codes are 0 at any scale."""
_VECTOR_SCALES = (1e-5, 1e4)
"""Bounds of scales of keys and values, as in SpikingBrain's published inference code."""


def group_width(group_size: int, width: int) -> int:
    """Numbers that share a scale in rows of ``width``: a row that is shorter than a group is one."""
    return min(group_size, width)


def group_scales(x: Tensor, group_size: int) -> Tensor:
    """The scale of every group, without a gradient.

    Args:
        x: [..., I] floating point; I is a multiple of ``group_size``, or below it.
        group_size: neighbours along the last dimension that share a scale.

    Returns:
        [..., N] float32 (float64 for float64 numbers).
    """
    grouped = x.detach().unflatten(-1, (-1, group_width(group_size, x.shape[-1])))
    return scales_of(grouped.abs().amax(-1))


def scales_of(largest: Tensor) -> Tensor:
    """Scales of groups whose largest magnitudes are known: any shape, in the dtype of scales."""
    exact = (largest.to(_dtype_of_scales(largest)) / LARGEST_CODE).clamp_(min=_SMALLEST_SCALE)
    near = exact.to(torch.bfloat16)
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)  # the next larger one, of positive numbers
    return torch.where(near.to(exact.dtype) < exact, above, near).to(exact.dtype)


def int8_codes(x: Tensor, scales: Tensor, *, bounded: bool = True) -> Tensor:
    """Whole numbers from -127 to 127 that times their scale are next to x.

    Args:
        x: [..., I] floating point.
        scales: [..., N] of groups of I / N neighbours.
        bounded: False takes whole numbers of any size, which scales from elsewhere may ask for.

    Returns:
        [..., I] in the dtype of the scales; ``.to(torch.int8)`` changes no value of bounded ones.
    """
    grouped = x.detach().to(scales.dtype).unflatten(-1, (scales.shape[-1], -1))
    codes = (grouped / scales.unsqueeze(-1)).round_()
    return (codes.clamp_(-LARGEST_CODE, LARGEST_CODE) if bounded else codes).flatten(-2)


def from_codes(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What codes stand for.

    Args:
        codes: [..., I] whole numbers of any dtype.
        scales: [..., N] of groups of I / N neighbours.
        dtype: of the result.
    """
    # Into a tensor of its own: a view that an autograd function returns passes for one without a gradient in
    # the next function, where torch.matmul then makes a product for each sequence instead of one for all.
    values = torch.empty_like(codes, dtype=scales.dtype)
    groups = (scales.shape[-1], -1)
    torch.mul(codes.unflatten(-1, groups), scales.unsqueeze(-1), out=values.unflatten(-1, groups))
    return values.to(dtype)


def int8_rounding(x: Tensor, scales: Tensor, *, bounded: bool = True) -> Tensor:
    """x as INT8 numbers hold it; the gradient with respect to x is the identity.

    Args:
        x: [..., I] floating point.
        scales: [..., N] of groups of I / N neighbours.
        bounded: as for :func:`int8_codes`.
    """
    return _StraightThrough.apply(x, scales, bounded)


def int8_vectors(x: Tensor) -> Tensor:
    """Keys and values as INT8 numbers hold them, with one scale for every token and head.

    The gradient with respect to x is the identity.

    Args:
        x: [..., dim] floating point.
    """
    largest = x.detach().abs().amax(-1, keepdim=True)
    scales = (largest.to(_dtype_of_scales(x)) / LARGEST_CODE).clamp_(*_VECTOR_SCALES)
    return int8_rounding(x, scales)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, bounded: bool) -> Tensor:
        return from_codes(int8_codes(x, scales, bounded=bounded), scales, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return grad_output, None, None


def _dtype_of_scales(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
