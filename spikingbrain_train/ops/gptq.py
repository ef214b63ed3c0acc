"""INT8 codes of a weight that is known to read certain inputs: plain rounding and GPTQ's compensation.

What a linear y = W x is off by on its inputs is tr(D H D'), where D is what W is off by and H = sum x x' the
second moments of its inputs. Plain rounding takes the next code of every weight, with a scale for each group
that is best on the diagonal of H. GPTQ (Frantar et al., arXiv 2210.17323) goes through the input channels one
by one and lets those that are still floats make up for what those before are off by.

Shape letters: O outputs, I inputs, N groups of a row, S inputs of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spikingbrain_train.ops.int8_groups import (
    LARGEST_CODE,
    from_codes,
    group_scales,
    group_width,
    int8_codes,
    scales_of,
)

_SHRUNK = (0.99, 0.98, 0.96, 0.94, 0.92, 0.9, 0.87, 0.84, 0.8)
"""Scales that are tried beside that of the largest weight, as shares of it."""
_DAMPING = 0.01
"""Share of the mean second moment that is added to each, as GPTQ's authors do."""
_BLOCK = 128
"""Channels after which those behind them are brought up to date at once."""


@dataclass(frozen=True)
class Rounded:
    """A weight as INT8 numbers."""

    codes: Tensor
    """[O, I] int8."""
    scales: Tensor
    """[O, N] float32, of the digits of bfloat16."""

    def weight(self) -> Tensor:
        """[O, I] float32: what the codes stand for."""
        return from_codes(self.codes, self.scales, torch.float32)


def plain_rounding(weight: Tensor, group_size: int, moments: Tensor | None = None) -> Rounded:
    """The next code of every weight.

    Args:
        weight: [O, I] floating point.
        group_size: neighbours along the input that share a scale.
        moments: [I] second moments of the inputs, to choose scales by: of a few shares of the largest
            weight's the one with the least squared error of the output, were its inputs independent. None
            takes the largest weight's, which cuts nothing off and is what training sees.
    """
    weight = weight.detach().float()
    scales = group_scales(weight, group_size)
    if moments is None:
        return Rounded(int8_codes(weight, scales).to(torch.int8), scales)
    best_scales, best_errors = scales, _group_errors(weight, scales, moments)
    largest = weight.unflatten(1, (scales.shape[1], -1)).abs().amax(-1)
    for share in _SHRUNK:
        tried = scales_of(largest * share)
        errors = _group_errors(weight, tried, moments)
        better = errors < best_errors
        best_scales = torch.where(better, tried, best_scales)
        best_errors = torch.where(better, errors, best_errors)
    return Rounded(int8_codes(weight, best_scales).to(torch.int8), best_scales)


def gptq_rounding(weight: Tensor, group_size: int, hessian: Tensor) -> Rounded:
    """Codes whose errors make up for each other on the inputs that were seen.

    A scale is that of the largest weight of its group when its first channel is reached.

    Args:
        weight: [O, I] floating point.
        group_size: neighbours along the input that share a scale.
        hessian: [I, I] sum of x x' over inputs x.
    """
    rest = weight.detach().double().clone()
    width, inputs = group_width(group_size, rest.shape[1]), rest.shape[1]
    root = _inverse_root(hessian)
    codes = torch.empty(rest.shape, dtype=torch.int8)
    scales = torch.empty(len(rest), inputs // width)
    for first, last in _blocks(inputs, width):
        errors = torch.zeros(len(rest), last - first, dtype=torch.float64)
        for channel in range(first, last):
            group = channel // width
            if channel % width == 0:
                largest = rest[:, channel : channel + width].abs().amax(1)
                scales[:, group] = scales_of(largest.float())
            scale = scales[:, group].double()
            code = (rest[:, channel] / scale).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
            codes[:, channel] = code.to(torch.int8)
            error = (rest[:, channel] - code * scale) / root[channel, channel]
            errors[:, channel - first] = error
            if channel + 1 < last:
                rest[:, channel + 1 : last] -= error.unsqueeze(1) * root[channel, channel + 1 : last]
        rest[:, last:] -= errors @ root[first:last, last:]
    return Rounded(codes, scales)


def output_error(weight: Tensor, rounded: Rounded, hessian: Tensor) -> float:
    """Root mean square of what the output is off by on the inputs that were seen, over that of the output."""
    weight, hessian = weight.detach().double(), hessian.double()
    difference = rounded.weight().double() - weight
    whole = ((weight @ hessian) * weight).sum().clamp_min(1e-300)
    return float((((difference @ hessian) * difference).sum().clamp_min(0.0) / whole).sqrt())


def _blocks(inputs: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of channels; every group begins with a range or within one that holds all of it."""
    if width <= _BLOCK:
        step = _BLOCK // width * width
        yield from ((first, min(first + step, inputs)) for first in range(0, inputs, step))
        return
    for group in range(0, inputs, width):
        for first in range(group, group + width, _BLOCK):
            yield first, min(first + _BLOCK, group + width)


def _group_errors(weight: Tensor, scales: Tensor, moments: Tensor) -> Tensor:
    difference = from_codes(int8_codes(weight, scales), scales, torch.float32) - weight
    return (difference.square() * moments.float()).unflatten(1, (scales.shape[1], -1)).sum(-1)


def _inverse_root(hessian: Tensor) -> Tensor:
    """[I, I] float64 upper triangle U with U' U = inverse(H), of H damped; a silent channel is left alone."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += _DAMPING * diagonal.mean()
    lower = torch.linalg.cholesky(damped)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
