"""Adaptive-threshold spike encoding (SpikingBrain, arXiv 2509.05276, eq. 19-21).

Per token x [D], the whole input of a projection:

    Vth = mean(|x|) / k, clamped to [1e-5, 1e4]
    s_int = round(x / Vth)            (half to even; the signed number of spikes of each channel)
    y = s_int * Vth

The gradient is straight-through: dy/dx = 1, and nothing flows through Vth. Nothing is saved for the backward
pass.

The threshold is the only thing that a token's channels share, so an input that is split over ranks needs
one number a token from the others: :func:`magnitude_sum` of each part, added up, goes into
:func:`spike_encoding`.

Shape letters: N tokens (all leading dimensions), D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from spikingbrain_train.runtime.packages import has_package

MIN_THRESHOLD, MAX_THRESHOLD = 1e-5, 1e4
"""Bounds of Vth, as in SpikingBrain's published inference code."""

# Elements that the CPU works on at a time, so that all passes over them run in a core's cache.
_BLOCK_ELEMENTS = 1 << 16


def spike_encoding(
    x: Tensor, k: float, *, magnitudes: Tensor | None = None, width: int | None = None
) -> Tensor:
    """Replace every channel by its spike count times its token's threshold.

    Args:
        x: [..., D], floating point; or a part of the channels.
        k: spikes of an average channel, above 0; larger is finer.
        magnitudes: [..., 1] sum of |x| over all channels, where x is a part of them; see
            :func:`magnitude_sum`. None takes x's own.
        width: channels of the whole input; needed with ``magnitudes``.

    Returns:
        [..., D] in x's dtype; thresholds and counts are computed in float32 (float64 for float64 inputs), and
        the product is rounded once, to x's dtype. Differs from x by at most Vth / 2 a channel beside that
        rounding. The gradient with respect to x is the identity.
    """
    return _StraightThrough.apply(x, token_threshold(x, k, magnitudes=magnitudes, width=width))


def naive_spike_encoding(x: Tensor, k: float) -> Tensor:
    """The equations as they are written, for tests: same arguments and result as :func:`spike_encoding`."""
    exact = x.detach().double()
    threshold = (exact.abs().mean(dim=-1, keepdim=True) / k).clamp(MIN_THRESHOLD, MAX_THRESHOLD)
    threshold = threshold.to(_dtype_of_counts(x)).double()
    encoded = (torch.round(exact / threshold) * threshold).to(x.dtype)
    return x + (encoded - x).detach()


def spike_counts(
    x: Tensor, k: float, *, magnitudes: Tensor | None = None, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """s_int and Vth, without a gradient. Arguments as in :func:`spike_encoding`.

    Returns:
        s_int [..., D], whole numbers as float32 (float64 for float64 inputs), because a channel that carries
        most of a wide token counts up to D * k; and Vth [..., 1] in the same dtype.
    """
    threshold = token_threshold(x, k, magnitudes=magnitudes, width=width)
    return (x.detach().to(threshold.dtype) / threshold).round_(), threshold


def magnitude_sum(x: Tensor) -> Tensor:
    """Sum of |x| over the last dimension, without a gradient.

    The sum decides on which side of a rounding boundary x / Vth falls, so it must not depend on how the
    channels are split over ranks or in which order they are added. float32 inputs are therefore summed in
    float64, whose rounding error is far below what moves the float32 threshold; smaller inputs in float32.

    Args:
        x: [..., D], floating point.

    Returns:
        [..., 1], float64 for float32 and float64 inputs, float32 for smaller ones.
    """
    x = x.detach()
    dtype = torch.float64 if x.dtype in (torch.float32, torch.float64) else torch.float32
    if x.device.type != "cpu" or x.numel() <= _BLOCK_ELEMENTS:
        return torch.linalg.vector_norm(x, ord=1, dim=-1, keepdim=True, dtype=dtype)
    x_ND = x.reshape(-1, x.shape[-1])
    sums = torch.empty(len(x_ND), 1, dtype=dtype)
    for rows in _blocks(x_ND):
        torch.linalg.vector_norm(x_ND[rows].to(dtype), ord=1, dim=-1, keepdim=True, out=sums[rows])
    return sums.view(*x.shape[:-1], 1)


def token_threshold(
    x: Tensor, k: float, *, magnitudes: Tensor | None = None, width: int | None = None
) -> Tensor:
    """Vth [..., 1] of every token, float32 (float64 for float64 inputs). As in :func:`spike_encoding`."""
    if magnitudes is None:
        magnitudes, width = magnitude_sum(x), x.shape[-1]
    assert width is not None, "magnitudes of the whole input come with its width"
    threshold = (magnitudes / (width * k)).clamp_(MIN_THRESHOLD, MAX_THRESHOLD)
    return threshold.to(_dtype_of_counts(x))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor) -> Tensor:
        x_ND, threshold_N1 = x.reshape(-1, x.shape[-1]), threshold.reshape(-1, 1)
        if x.device.type == "cpu":
            return _quantize_in_cache(x_ND, threshold_N1).view(x.shape)
        return _quantize_on_gpu()(x_ND, threshold_N1).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


def _quantize(x_ND: Tensor, threshold_N1: Tensor) -> Tensor:
    return ((x_ND.to(threshold_N1.dtype) / threshold_N1).round() * threshold_N1).to(x_ND.dtype)


def _quantize_in_cache(x_ND: Tensor, threshold_N1: Tensor) -> Tensor:
    y_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    for rows in _blocks(x_ND):
        threshold = threshold_N1[rows]
        if x_ND.dtype == threshold.dtype:
            torch.div(x_ND[rows], threshold, out=y_ND[rows]).round_().mul_(threshold)
        else:
            y_ND[rows] = (x_ND[rows].to(threshold.dtype)).div_(threshold).round_().mul_(threshold)
    return y_ND


@cache
def _quantize_on_gpu() -> Callable[[Tensor, Tensor], Tensor]:
    """One kernel (read x, write y) where torch can compile, as megatron-core does for its activations.

    Eager torch reads and writes the tensor once an operation, which for bfloat16 is some ten times the
    traffic. Compiled division may be off by two units in the last place, so a channel that lies on a rounding
    boundary may count one spike more or less than on the CPU; all ranks of a run agree.
    """
    return torch.compile(_quantize, dynamic=True) if has_package("triton") else _quantize


def _dtype_of_counts(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _blocks(x_ND: Tensor) -> Iterator[slice]:
    N, D = x_ND.shape
    rows = max(1, _BLOCK_ELEMENTS // max(D, 1))
    for start in range(0, N, rows):
        yield slice(start, min(start + rows, N))
