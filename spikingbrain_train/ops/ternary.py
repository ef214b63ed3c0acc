"""Ternary weights (BitNet b1.58, arXiv 2402.17764, eq. 1-3).

Of a matrix W [O, I]:

    scale = mean |W|, at least 1e-5
    code = round(W / scale) within -1 .. 1     (half to even, so that half the scale is 0)
    y = code * scale

The gradient is straight-through: dy/dW = 1, and nothing flows through the scale. Scales and codes are
computed in float32 (float64 for float64 weights), and y is rounded once, to W's dtype. The mean is added up
in float64, so that a matrix whose parts lie on several ranks has the same scale as a whole one.

Shape letters: O outputs, I inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SMALLEST_SCALE = 1e-5
"""Of a matrix of zeros, whose codes are 0 at any scale; as in the published training code."""


def magnitude_sum(weight: Tensor) -> Tensor:
    """Sum of |w| over a matrix, or over a part of one, without a gradient: [] float64."""
    return weight.detach().abs().sum(dtype=torch.float64)


def ternary_scales(magnitudes: Tensor, numel: Tensor | int, dtype: torch.dtype) -> Tensor:
    """Scales of whole matrices.

    Args:
        magnitudes: sums of |w| over each of them, float64.
        numel: numbers that each of them has.
        dtype: of the weights.

    Returns:
        The shape of ``magnitudes``, float32 (float64 for float64 weights).
    """
    exact = (magnitudes / numel).clamp(min=_SMALLEST_SCALE)
    return exact.to(torch.float64 if dtype == torch.float64 else torch.float32)


def ternary_codes(weight: Tensor, scales: Tensor) -> Tensor:
    """-1, 0 and 1 that times their scale are next to the weights, without a gradient.

    Args:
        weight: [O, I] floating point.
        scales: [] or [O, 1] of its rows.

    Returns:
        [O, I] in the dtype of the scales; ``.to(torch.int8)`` changes no value.
    """
    return (weight.detach().to(scales.dtype) * scales.reciprocal()).round_().clamp_(-1, 1)


def ternary_rounding(weight: Tensor, scales: Tensor) -> Tensor:
    """The weight as ternary numbers hold it; the gradient with respect to it is the identity.

    Args:
        weight: [O, I] floating point.
        scales: [] or [O, 1] of its rows.
    """
    return _StraightThrough.apply(weight, scales)


def pack_ternary(codes: Tensor) -> Tensor:
    """Four codes in a byte, as transformers' quantisation ``bitnet`` lays them out.

    Two bits hold a code + 1; those of byte [r, i], the lowest first, are rows r, r + O/4, r + O/2 and
    r + 3 O/4.

    Args:
        codes: [O, I] of -1, 0 and 1, any dtype; O is a multiple of 4.

    Returns:
        [O / 4, I] uint8.
    """
    digits = (codes + 1).to(torch.uint8).unflatten(0, (4, -1))
    return digits[0] | digits[1] << 2 | digits[2] << 4 | digits[3] << 6


def unpack_ternary(packed: Tensor) -> Tensor:
    """[O, I] int8 of -1, 0 and 1 from [O / 4, I] uint8: undo :func:`pack_ternary`."""
    digits = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)])
    return digits.flatten(0, 1).to(torch.int8) - 1


def ternary_parameters(codes: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Weights that are rounded to just these numbers: undo :func:`ternary_codes` and :func:`ternary_scales`.

    A matrix of codes times their scale has a smaller mean magnitude than the scale, because of its zeros. The
    codes here are times ``scale * numel / nonzero``, which lies between two neighbours in ``dtype``: as many
    of them, from the first row on, have the larger one as the mean needs, and the first three zeros the rest.

    Args:
        codes: [O, I] of -1, 0 and 1, any dtype.
        scale: the mean magnitude.
        dtype: of the weights.

    Returns:
        [O, I] ``dtype``. Whether scale and codes come back exactly is the caller's to look at: float16 may be
        too narrow, and less than 1/64 of nonzero codes too few for bfloat16.
    """
    in_rows = (codes != 0).sum(1).cumsum(0)
    nonzero, total = int(in_rows[-1]), scale * codes.numel()
    if nonzero == 0:
        return codes.to(dtype)
    low = _not_above(total / nonzero, dtype)
    high = torch.nextafter(low, torch.full_like(low, torch.inf))
    step = (high.double() - low.double()).item()
    rest = max(total - nonzero * low.double().item(), 0.0)
    larger = min(int(rest / step), nonzero)
    weight = codes.to(dtype) * low
    row = int(torch.searchsorted(in_rows, larger, right=True))
    weight[:row] = codes[:row].to(dtype) * high
    if row < len(codes):
        before = int(in_rows[row - 1]) if row else 0
        columns = codes[row].nonzero().flatten()[: larger - before]
        weight[row, columns] = codes[row, columns].to(dtype) * high
    rest -= larger * step
    for index in (codes == 0).flatten().nonzero().flatten()[:3]:  # each has what rounds off before it
        value = _not_above(rest, dtype)
        weight.view(-1)[index] = value
        rest -= value.item()
    return weight


def _not_above(exact: float, dtype: torch.dtype) -> Tensor:
    """[] the largest number of a format that is not above a number that is not negative."""
    nearest = torch.tensor(exact, dtype=torch.float64).to(dtype)
    return nearest if nearest.item() <= exact else torch.nextafter(nearest, torch.zeros_like(nearest))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scales: Tensor) -> Tensor:
        return ternary_codes(weight, scales).mul_(scales).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None
