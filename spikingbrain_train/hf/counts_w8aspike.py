"""Inputs of INT8 linears as whole numbers times one number a token (see quantization_w8aspike.py).

Part of the modelling code of a checkpoint; needs torch only. Rows are encoded in blocks that stay in a cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

_MIN_THRESHOLD, _MAX_THRESHOLD = 1e-5, 1e4
LARGEST = 127
DIGIT = 2 * LARGEST
"""What the upper of the two INT8 numbers of a 16-bit one counts."""


class Counts:
    """A tensor [..., I] as whole numbers times one number a token.

    Attributes:
        unit: [M, 1] float32.
        low: [M, I] int8, the whole numbers within -127 .. 127; of 16-bit ones [2 M, I], the upper digits
            of all tokens, then the lower ones.
        rest: [M, R] float32, what spike counts in `columns` have beyond; None where there are none.
        columns: [R] input channels, few.
    """

    def __init__(self, x: Tensor, activation: str, k: float) -> None:
        x_MI = x.detach().reshape(-1, x.shape[-1])
        tokens, width = x_MI.shape
        self.has_two_digits = activation == "int16"
        self.rest = self.columns = None
        if tokens * width <= BLOCK_ELEMENTS and not self.has_two_digits:
            unit, counts = _encoded(x_MI, activation, k)
            if activation != "spikes" or max(map(abs, _extremes(counts))) <= LARGEST:
                self.unit, self.low = unit, counts.to(torch.int8)
                return
        self.unit = x_MI.new_empty(tokens, 1, dtype=torch.float32)
        self.low = x_MI.new_empty(tokens * (1 + self.has_two_digits), width, dtype=torch.int8)
        beyond: list[tuple[int, Tensor]] = []
        for rows in row_blocks(tokens, width):
            unit, counts = _encoded(x_MI[rows], activation, k)
            self.unit[rows] = unit
            if self.has_two_digits:
                upper = torch.div(counts, DIGIT).round_()
                self.low[rows] = upper
                self.low[tokens + rows.start : tokens + rows.stop] = counts.sub_(upper, alpha=DIGIT)
            elif activation == "spikes" and max(map(abs, _extremes(counts))) > LARGEST:
                within = counts.clamp(-LARGEST, LARGEST)
                self.low[rows] = within
                beyond.append((rows.start, counts - within))
            else:
                self.low[rows] = counts
        if beyond:
            found = torch.stack([difference.any(0) for _, difference in beyond]).any(0)
            self.columns = found.nonzero().squeeze(1)
            self.rest = x_MI.new_zeros(tokens, len(self.columns), dtype=torch.float32)
            for first, difference in beyond:
                self.rest[first : first + len(difference)] = difference[:, self.columns]

    def values(self) -> Tensor:
        """[M, I] float32: what the counts stand for."""
        counts = self.low.float()
        if self.has_two_digits:
            upper, lower = counts.chunk(2)
            counts = upper * DIGIT + lower
        if self.rest is not None:
            counts[:, self.columns] += self.rest
        return counts.mul_(self.unit)


BLOCK_ELEMENTS = 1 << 17
"""Of a block that several passes find in a cache."""


def row_blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _encoded(x: Tensor, activation: str, k: float) -> tuple[Tensor, Tensor]:
    """The unit [rows, 1] of every row, and whole numbers [rows, I], both float32."""
    wide = x.float()
    if activation == "spikes":
        # In float64 where the input is not narrower than float32, as in spikes_gla_swa.py.
        exact = torch.float64 if x.dtype in (torch.float32, torch.float64) else torch.float32
        magnitude = torch.linalg.vector_norm(wide, ord=1, dim=-1, keepdim=True, dtype=exact)
        unit = (magnitude / (wide.shape[-1] * k)).float()
    else:
        largest = LARGEST * (1 + DIGIT) - 1 if activation == "int16" else LARGEST
        unit = torch.linalg.vector_norm(wide, ord=torch.inf, dim=-1, keepdim=True) / largest
    unit = unit.clamp_(_MIN_THRESHOLD, _MAX_THRESHOLD)
    return unit, torch.div(wide, unit).round_()


def _extremes(x: Tensor) -> list[float]:
    return torch.stack(torch.aminmax(x)).tolist()


class _LastCounts:
    """Counts of the newest input: q, k and v projection read the same, gate and up projection as well."""

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._input: weakref.ref | None = None
        self._counts: Counts | None = None

    def of(self, x: Tensor, activation: str, k: float) -> Counts:
        if torch.compiler.is_compiling():
            return Counts(x, activation, k)
        key = (activation, k, None if x.is_inference() else x._version)
        known = self._input is not None and self._input() is x and not x.is_inference()
        if not known or key != self._key or self._counts is None:
            self._counts, self._key, self._input = Counts(x, activation, k), key, weakref.ref(x)
        return self._counts


LAST = _LastCounts()


def encoded_input(x: Tensor, activation: str, k: float) -> Tensor:
    """What a linear with that activation makes of its input, as floats of x's shape and dtype."""
    if activation == "float":
        return x
    encoded = LAST.of(x, activation, k).values().view(x.shape).to(x.dtype)
    return x + (encoded - x).detach() if torch.is_grad_enabled() and x.requires_grad else encoded


__all__ = ["Counts", "encoded_input"]
