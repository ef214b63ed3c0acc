"""INT8 weights as the kernels of a CPU take them, and their products with whole numbers of an input.

Part of the modelling code of a checkpoint (see quantization_w8aspike.py); needs torch only.

Shape letters: M tokens, D digits, I inputs, O outputs, N groups of inputs that share a scale, S inputs of
one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .counts_w8aspike import Counts
from .kernels_w8aspike import Kernel, kernels

_BLOCK_TOKENS, _BLOCK_OUTPUTS = 512, 512
"""Of a block of the output that stays in a cache while group after group is added to it."""


class PackedWeight:
    """INT8 codes and their scales, packed when they are first multiplied.

    Args:
        codes_OI: int8, or what gives them where they are not to be kept.
        scale_ON: of groups of inputs, of any floating point dtype.
    """

    def __init__(self, codes_OI: Tensor | Callable[[], Tensor], scale_ON: Tensor) -> None:
        self._codes_OI = (lambda: codes_OI) if isinstance(codes_OI, Tensor) else codes_OI
        self._scale_NO = scale_ON.detach().float().t().contiguous()
        self._few: _FewTokens | None = None
        self._many: _ManyTokens | None = None

    def product(self, counts: Counts, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[M, O] in `dtype`: the input that counts stand for, times the weight, plus the bias."""
        if counts.is_few:
            if self._few is None:
                self._few = _FewTokens(self._codes_OI(), self._scale_NO, kernels()[0])
            return _finished(self._few.product(counts), counts.unit, bias_O).to(dtype)
        if self._many is None:
            self._many = _ManyTokens(self._codes_OI, self._scale_NO, kernels()[1])
        return self._many.product(counts, bias_O, dtype)


def _finished(y_MO: Tensor, unit_M1: Tensor, bias_O: Tensor | None) -> Tensor:
    return y_MO.mul_(unit_M1) if bias_O is None else torch.addcmul(bias_O.float(), y_MO, unit_M1)


class _FewTokens:
    """Weights are read once, in few products: groups together, each in rows of its own."""

    def __init__(self, codes_OI: Tensor, scale_NO: Tensor, kernel: Kernel) -> None:
        self._kernel, self._num_groups = kernel, len(scale_NO)
        self._together = _groups_together(self._num_groups, codes_OI.shape[1], kernel.inputs_at_once)
        parts = codes_OI.chunk(self._num_groups // self._together, dim=1)
        if self._together == 1:
            scales, self._scale_NO = list(scale_NO), None
        else:
            scales, self._scale_NO = [torch.ones(len(codes_OI))] * len(parts), scale_NO
        self._packed = [kernel.pack(part, scale_O) for part, scale_O in zip(parts, scales, strict=True)]

    def product(self, counts: Counts) -> Tensor:
        """[M, O] float32, in units of a token."""
        inputs, product, scale_NO = (
            counts.apart(self._num_groups, self._together),
            self._kernel.product,
            self._scale_NO,
        )
        if scale_NO is None:
            y = product(inputs[0], self._packed[0])
            for x, packed in zip(inputs[1:], self._packed[1:], strict=True):
                y = product(x, packed, y)
        else:
            parts = [product(x, packed) for x, packed in zip(inputs, self._packed, strict=True)]
            sums = parts[0] if len(parts) == 1 else torch.cat(parts)
            sums_PDMCO = sums.view(len(parts), len(counts.digits), -1, self._together, sums.shape[1])
            y_PMCO = counts.joined(list(sums_PDMCO.unbind(1)))
            y_PMCO = y_PMCO.mul_(scale_NO.view(len(parts), 1, self._together, -1))
            return y_PMCO.flatten(0, 2).sum(0, keepdim=True) if y_PMCO.shape[1] == 1 else y_PMCO.sum(2).sum(0)
        tokens = len(counts.unit)
        return y if len(y) == tokens else counts.joined(list(y.split(tokens)))


def _groups_together(num_groups: int, inputs: int, at_once: int | None) -> int:
    """Neighbouring groups that have at most so many inputs; they divide all groups."""
    fit = num_groups if at_once is None else at_once * num_groups // inputs
    return max(
        number for number in range(1, num_groups + 1) if number <= max(1, fit) and num_groups % number == 0
    )


class _ManyTokens:
    """Group after group is added to a block of the output, which is then finished."""

    def __init__(self, codes: Callable[[], Tensor], scale_NO: Tensor, kernel: Kernel) -> None:
        self._kernel, self._codes_OI, self._scale_NO = kernel, codes, scale_NO
        self._blocks, codes_OI = [], codes()
        for outputs in _slices(len(codes_OI), _BLOCK_OUTPUTS):
            groups = codes_OI[outputs].chunk(len(scale_NO), dim=1)
            packed = [
                kernel.pack(part, scale_O[outputs]) for part, scale_O in zip(groups, scale_NO, strict=True)
            ]
            self._blocks.append((outputs, packed))

    def product(self, counts: Counts, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[M, O] in `dtype`."""
        digits_NDMS = counts.by_group(len(self._scale_NO))
        made = torch.empty(len(counts.unit), self._scale_NO.shape[1], dtype=dtype)
        rest_MR, beyond_RO = counts.rest, None
        if rest_MR is not None:
            beyond_RO = self._float_weight(counts.columns)
        for outputs, packed in self._blocks:
            bias = None if bias_O is None else bias_O[outputs]
            for tokens in _slices(len(made), _BLOCK_TOKENS):
                y = counts.joined([self._sum(x_NMS, packed) for x_NMS in digits_NDMS[:, :, tokens].unbind(1)])
                if rest_MR is not None and beyond_RO is not None:
                    y.addmm_(rest_MR[tokens], beyond_RO[:, outputs])
                made[tokens, outputs] = _finished(y, counts.unit[tokens], bias)
        return made

    def _sum(self, digits_NMS: Tensor, packed: list) -> Tensor:
        y = None
        for x_MS, of_group in zip(digits_NMS, packed, strict=True):
            y = self._kernel.product(x_MS, of_group, y)
        assert y is not None
        return y

    def _float_weight(self, columns_R: Tensor) -> Tensor:
        """[R, O] float32: what the codes of some inputs stand for."""
        codes_OI = self._codes_OI()
        width = codes_OI.shape[1] // len(self._scale_NO)
        return codes_OI[:, columns_R].t().float() * self._scale_NO[columns_R // width]


def _slices(length: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]


__all__ = ["PackedWeight"]
