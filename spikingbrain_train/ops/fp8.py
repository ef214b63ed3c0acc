"""Products of FP8 numbers, computed in plain PyTorch: what Transformer Engine's linears do on GPUs.

Of a matrix x, cut into blocks that have a scale each (:class:`Blocks`), for a format whose largest number is
M (448 for e4m3, 57344 for e5m2):

    scale = M / max |x| over the block               (1 where that is 0, infinite or NaN)
    code  = x * scale, rounded to the format         (half to even, larger ones to M)
    y     = code / scale

``powers_of_two`` rounds scales down to a power of 2, as Transformer Engine does for blocks of 128. Blocks of
32 (MX formats) have the smallest power of 2 that lets no number exceed M in the place of ``1 / scale``.
Scales and what they multiply are float32 (float64 for float64 numbers).

A linear y = x W^T multiplies three times, each time along another axis (NVIDIA's Transformer Engine;
DeepSeek-V3, arXiv 2412.19437, figure 6):

    y  = x  W^T    blocks of x and W along inputs
    dx = dy W      blocks of dy and W along outputs
    dW = dy^T x    blocks of dy and x along tokens

Sums are float32, too. Where blocks have a direction, a matrix that is multiplied along both is rounded twice,
from the same exact numbers.

Shape letters: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spikingbrain_train.config.fp8 import Fp8Format, Fp8Recipe

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Blocks:
    """What shares a scale."""

    across: int | None
    """Neighbours across the sum of a product; None: all."""
    along: int | None
    """Neighbours along the sum; None: all."""
    powers_of_two: bool = False
    """Whether scales are powers of 2, rounded down."""
    exponents: bool = False
    """Whether what codes are multiplied by is the exponent alone of max |x| / M, rounded up (E8M0)."""

    @property
    def has_direction(self) -> bool:
        """Whether a matrix is rounded otherwise where it is summed along its other axis."""
        return self.across != self.along


@dataclass(frozen=True)
class Rounding:
    """Formats and blocks of a linear's products."""

    values: Blocks
    """Of inputs and gradients."""
    weights: Blocks
    forward: torch.dtype
    """Of inputs and weights."""
    backward: torch.dtype
    """Of gradients."""


_TENSOR = Blocks(None, None)
_BLOCKS: dict[Fp8Recipe, tuple[Blocks, Blocks]] = {
    Fp8Recipe.tensorwise: (_TENSOR, _TENSOR),
    Fp8Recipe.blockwise: (
        Blocks(1, 128, powers_of_two=True),
        Blocks(128, 128, powers_of_two=True),
    ),
    Fp8Recipe.mxfp8: (Blocks(1, 32, exponents=True), Blocks(1, 32, exponents=True)),
}
_BACKWARD = {Fp8Format.e4m3: E4M3, Fp8Format.hybrid: E5M2}


def rounding_of(format: Fp8Format, recipe: Fp8Recipe) -> Rounding:
    """What a run's settings say of the products of its linears."""
    values, weights = _BLOCKS[recipe]
    return Rounding(values, weights, E4M3, _BACKWARD[format])


@dataclass(frozen=True)
class Codes:
    """A matrix [R, C] as FP8 numbers hold it, to be summed along its columns."""

    codes: Tensor
    """[R, C] of an FP8 format."""
    inverse_scales: Tensor
    """[] for the whole matrix, else one for each block, [ceil(R / across), ceil(C / along)]; float32, or
    float64 of such numbers."""
    blocks: Blocks

    def values(self) -> Tensor:
        """[R, C] in the dtype of the scales: codes times their inverse scales."""
        return self.codes.to(self.inverse_scales.dtype) * self._expanded()

    def transposed(self) -> Codes:
        """The same numbers, to be summed along the rows; of blocks without a direction."""
        assert not self.blocks.has_direction
        scales = self.inverse_scales
        return Codes(self.codes.t(), scales if scales.dim() == 0 else scales.t(), self.blocks)

    def _expanded(self) -> Tensor:
        scales, (rows, columns) = self.inverse_scales, self.codes.shape
        if scales.dim() == 0:
            return scales
        across, along = self.blocks.across or rows, self.blocks.along or columns
        return scales.repeat_interleave(across, 0)[:rows].repeat_interleave(along, 1)[:, :columns]


def fp8_codes(x: Tensor, format: torch.dtype, blocks: Blocks) -> Codes:
    """Round a matrix.

    Args:
        x: [R, C] floating point.
        format: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        blocks: what shares a scale; sums run along C.
    """
    exact = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    scales, inverse = _scales(_largest_magnitudes(exact, blocks), format, blocks)
    largest = torch.finfo(format).max
    expanded = Codes(exact, scales, blocks)._expanded()
    # torch makes NaN of what is too large for a format; Transformer Engine, the largest number.
    codes = (exact * expanded).clamp_(-largest, largest).to(format)
    return Codes(codes, inverse, blocks)


def _largest_magnitudes(x: Tensor, blocks: Blocks) -> Tensor:
    """max |x| of each block; those at the ends of a matrix may be smaller."""
    if blocks.across is None and blocks.along is None:
        return x.abs().amax() if x.numel() else x.new_zeros(())
    across, along = blocks.across or len(x), blocks.along or x.shape[1]
    rows, columns = -(-len(x) // across), -(-x.shape[1] // along)
    padded = torch.nn.functional.pad(x.abs(), (0, columns * along - x.shape[1], 0, rows * across - len(x)))
    return padded.view(rows, across, columns, along).amax((1, 3))


def _scales(largest: Tensor, format: torch.dtype, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """What numbers of each block are multiplied by before they are rounded, and what codes are."""
    if blocks.exponents:
        mantissa, exponent = torch.frexp(largest * (1 / torch.finfo(format).max))
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)
        usable = largest.isfinite() & (largest > 0)
        inverse = torch.where(usable, torch.ldexp(torch.ones_like(largest), exponent), 1.0)
        return 1 / inverse, inverse
    # A number divided by a tensor is the number times a reciprocal to torch, which may round otherwise.
    scales = torch.full_like(largest, torch.finfo(format).max) / largest
    scales = torch.where(scales.isinf(), torch.finfo(scales.dtype).max, scales)
    if blocks.powers_of_two:
        _, exponent = torch.frexp(scales)
        scales = torch.ldexp(torch.ones_like(scales), exponent - 1)
    scales = torch.where(largest.isfinite() & (largest > 0), scales, 1.0)
    return scales, 1 / scales


def fp8_product(a: Codes, b: Codes) -> Tensor:
    """[R, C] in the dtype of the scales: ``a`` [R, K] times the transpose of ``b`` [C, K]."""
    if a.inverse_scales.dim() == b.inverse_scales.dim() == 0:
        scale = a.inverse_scales * b.inverse_scales
        return (a.codes.to(scale.dtype) @ b.codes.to(scale.dtype).t()).mul_(scale)
    return a.values() @ b.values().t()


def fp8_linear(x: Tensor, weight: Tensor, rounding: Rounding) -> Tensor:
    """x W^T and its gradients, each a product of FP8 numbers.

    Between the passes it keeps the numbers as rounded, a byte each.

    Args:
        x: [..., I] floating point.
        weight: [O, I].
        rounding: formats and scales.

    Returns:
        [..., O] in x's dtype.
    """
    return _Fp8Linear.apply(x, weight, rounding)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounding: Rounding) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        x_TI, format = x.reshape(-1, x.shape[-1]), rounding.forward
        along_inputs = fp8_codes(x_TI, format, rounding.values)
        w = fp8_codes(weight, format, rounding.weights)
        saved: list[Tensor] = []
        if needs_weight:
            kept = _other_way(along_inputs, x_TI)
            saved += [kept.codes, kept.inverse_scales]
        if needs_x:
            kept = _other_way(w, weight)
            saved += [kept.codes, kept.inverse_scales]
        ctx.save_for_backward(*saved)
        ctx.rounding, ctx.like = rounding, (x.shape, x.dtype, weight.dtype)
        return fp8_product(along_inputs, w).to(x.dtype).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rounding: Rounding = ctx.rounding
        needs_x, needs_weight, _ = ctx.needs_input_grad
        saved, (x_shape, x_dtype, weight_dtype) = list(ctx.saved_tensors), ctx.like
        dy_TO = grad_output.reshape(-1, grad_output.shape[-1])
        along_outputs = fp8_codes(dy_TO, rounding.backward, rounding.values)
        dx = dw = None
        if needs_weight:
            x_IT = Codes(saved.pop(0), saved.pop(0), rounding.values)
            dw = fp8_product(_other_way(along_outputs, dy_TO), x_IT).to(weight_dtype)
        if needs_x:
            w_IO = Codes(saved.pop(0), saved.pop(0), rounding.weights)
            dx = fp8_product(along_outputs, w_IO).to(x_dtype).view(x_shape)
        return dx, dw, None


def _other_way(along_columns: Codes, exact: Tensor) -> Codes:
    """A matrix to be summed along its rows: of what it was rounded from where blocks have a direction."""
    if not along_columns.blocks.has_direction:
        return along_columns.transposed()
    return fp8_codes(exact.t(), along_columns.codes.dtype, along_columns.blocks)
