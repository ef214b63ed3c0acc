"""Inputs of INT8 linears as whole numbers times one number a token (see quantization_w8aspike.py).

Part of the modelling code of a checkpoint; needs torch only. Rows are encoded in blocks that stay in a cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .kernels_w8aspike import Kernel, kernels

Made = TypeVar("Made")
_MIN_THRESHOLD, _MAX_THRESHOLD = 1e-5, 1e4
LARGEST = 127
LARGEST_16_BIT = 32384
FEW_TOKENS = 4
"""Up to which a product takes about as long as for one, because it waits for weights."""
BLOCK_ELEMENTS = 1 << 17
"""Of a block that several passes find in a cache."""


class Counts:
    """A tensor [..., I] as whole numbers times one number a token, in digits that a kernel multiplies.

    A count is the sum of its digits d0 + d1 * base + ...; of spike counts of many tokens, few of which need a
    second digit, it is d0 and a rest in some channels.

    Attributes:
        unit: [M, 1] float32.
        kernel: that multiplies the digits.
        is_few: whether these are so few tokens that a product waits for weights.
        base: what a digit counts of the one before.
        digits: [D, M, I], the lowest first; of few tokens float32, of many in the format of the kernel.
        rest: [M, R] float32, what counts in `columns` have beyond; None where there are none.
        columns: [R] input channels, few.
    """

    def __init__(self, x: Tensor, activation: str, k: float) -> None:
        x_MI = _rows(x)
        tokens, width = x_MI.shape
        self.is_few = tokens <= FEW_TOKENS
        self.kernel: Kernel = kernels()[0 if self.is_few else 1]
        self.base = 2 * self.kernel.largest + 1
        self.rest: Tensor | None = None
        self.columns = torch.empty(0, dtype=torch.int64)
        self._arranged: dict[tuple[int, int], Any] = {}
        if self.is_few:
            self.unit, counts = whole_numbers(x_MI, activation, k)
            largest = _largest_magnitude(counts) if activation == "spikes" else _LARGEST[activation]
            self.digits = self._split(counts, self._number_of_digits(largest))
            return
        number = 1 if activation == "spikes" else self._number_of_digits(_LARGEST[activation])
        self.unit = x_MI.new_empty(tokens, 1, dtype=torch.float32)
        made: list[Tensor] = []
        beyond: list[tuple[int, Tensor]] = []
        for rows in row_blocks(tokens, width):
            self.unit[rows], counts = whole_numbers(x_MI[rows], activation, k)
            if activation == "spikes" and _largest_magnitude(counts) > self.kernel.largest:
                within = counts.clamp(-self.kernel.largest, self.kernel.largest)
                beyond.append((rows.start, counts - within))
                counts = within
            made.append(self.kernel.digits(self._split(counts, number)))
        self.digits = made[0] if len(made) == 1 else torch.cat(made, dim=1)
        if beyond:
            found = torch.stack([difference.any(0) for _, difference in beyond]).any(0)
            self.columns = found.nonzero().squeeze(1)
            self.rest = x_MI.new_zeros(tokens, len(self.columns), dtype=torch.float32)
            for first, difference in beyond:
                self.rest[first : first + len(difference)] = difference[:, self.columns]

    def by_group(self, num_groups: int) -> Tensor:
        """[N, D, M, S]: the digits of each group of inputs, of many tokens."""
        if num_groups == 1:
            return self.digits.unsqueeze(0)
        key = (num_groups, 0)
        if key not in self._arranged:
            grouped_DMNS = self.digits.unflatten(-1, (num_groups, -1))
            self._arranged[key] = grouped_DMNS.movedim(2, 0).contiguous()
        return self._arranged[key]

    def apart(self, num_groups: int, together: int) -> tuple[Tensor, ...]:
        """Of few tokens, every group of inputs in rows of its own, with zeros where others are.

        Returns:
            N / together of [D * M * together, together * S] in the format of the kernel.
        """
        key = (num_groups, together)
        found = self._arranged.get(key)
        if found is None:
            D, M, inputs = self.digits.shape
            products, width = num_groups // together, inputs // num_groups * together
            apart = self.digits.view(D * M, products, width)
            if products > 1:
                apart = apart.transpose(0, 1)
            if together > 1:
                apart = apart.unsqueeze(2) * _own_inputs(inputs // num_groups, together)
            made = self.kernel.digits(apart.reshape(products, -1, width))
            found = self._arranged[key] = made.unbind()
        return found

    def joined(self, products: list[Tensor]) -> Tensor:
        """What products of the digits add up to, the lowest first: each [M, O], which it may change."""
        y = products[-1]
        for lower in reversed(products[:-1]):
            y = lower.add_(y, alpha=self.base)
        return y

    def _number_of_digits(self, largest: float) -> int:
        number, reach = 1, self.kernel.largest
        while reach < largest:
            number, reach = number + 1, reach * self.base + self.kernel.largest
        return number

    def _split(self, counts: Tensor, number: int) -> Tensor:
        if number == 1:
            return counts.unsqueeze(0)
        digits = []
        for _ in range(number - 1):
            upper = torch.div(counts, self.base).round_()
            digits.append(torch.sub(counts, upper, alpha=self.base))
            counts = upper
        return torch.stack([*digits, counts])


_LARGEST = {"int8": LARGEST, "int16": LARGEST_16_BIT, "int8_tokens": LARGEST}


def int8_token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 numbers as BitNet b1.58 rounds inputs to them (arXiv 2402.17764, section 2), without a gradient.

    Args:
        x: [..., I].

    Returns:
        Numbers of a unit [..., 1], 127 / max |x| of a token, and the whole numbers [..., I]; float32 (float64
        for float64 inputs).
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    largest = x.detach().abs().amax(-1, keepdim=True).to(exact)
    per_unit = LARGEST / largest.clamp(min=1e-5)
    return per_unit, (x.detach().to(exact) * per_unit).round_().clamp_(-LARGEST, LARGEST)


def whole_numbers(x: Tensor, activation: str, k: float) -> tuple[Tensor, Tensor]:
    """The unit [M, 1] of every row of x [M, I], and its whole numbers [M, I], both float32."""
    if activation == "int8_tokens":
        per_unit, codes = int8_token_codes(x.float())
        return per_unit.reciprocal(), codes
    wide = x.float()
    if activation == "spikes":
        # In float64 where the input is not narrower than float32, as in spikes_gla_swa.py.
        exact = torch.float64 if x.dtype in (torch.float32, torch.float64) else torch.float32
        # Not vector_norm, which is several times as slow on CPUs.
        unit = wide.abs().sum(-1, keepdim=True, dtype=exact).div_(wide.shape[-1] * k).float()
    else:
        unit = wide.abs().amax(-1, keepdim=True).div_(_LARGEST[activation])
    unit.clamp_(_MIN_THRESHOLD, _MAX_THRESHOLD)
    return unit, torch.div(wide, unit).round_()


def row_blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows that a cache holds."""
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _rows(x: Tensor) -> Tensor:
    x = x.detach() if x.requires_grad else x
    return x.reshape(-1, x.shape[-1])


def _largest_magnitude(x: Tensor) -> float:
    smallest, largest = torch.aminmax(x)
    return max(-smallest.item(), largest.item())


@lru_cache
def _own_inputs(group: int, together: int) -> Tensor:
    """[together, together * group]: ones where a group of inputs meets its own row."""
    return torch.eye(together).repeat_interleave(group, dim=1)


class _Last(Generic[Made]):
    """What was made of the newest input: q, k and v projection read the same, gate and up projection too."""

    def __init__(self, make: Callable[[Tensor, str, float], Made]) -> None:
        self._make = make
        self._key: tuple | None = None
        self._input: weakref.ref | None = None
        self._made: Made | None = None

    def of(self, x: Tensor, activation: str, k: float) -> Made:
        if torch.compiler.is_compiling() or x.is_inference():
            return self._make(x, activation, k)
        key = (activation, k, x._version)
        if self._made is None or self._input is None or self._input() is not x or key != self._key:
            self._made, self._key, self._input = self._make(x, activation, k), key, weakref.ref(x)
        return self._made


def _values(x: Tensor, activation: str, k: float) -> Tensor:
    unit, counts = whole_numbers(_rows(x), activation, k)
    return counts.mul_(unit).view(x.shape).to(x.dtype)


LAST_COUNTS, _LAST_VALUES = _Last(Counts), _Last(_values)


def encoded_input(x: Tensor, activation: str, k: float) -> Tensor:
    """What a linear with that activation makes of its input, as floats of x's shape and dtype."""
    if activation == "float":
        return x
    encoded = _LAST_VALUES.of(x, activation, k)
    return x + (encoded - x).detach() if torch.is_grad_enabled() and x.requires_grad else encoded


__all__ = ["Counts", "encoded_input", "int8_token_codes"]
