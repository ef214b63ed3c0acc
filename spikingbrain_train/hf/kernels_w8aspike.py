"""Products of whole numbers with INT8 weights on CPUs: those kernels of torch that are exact on this one.

Part of the modelling code of a checkpoint (see quantization_w8aspike.py); needs torch only. A kernel
multiplies digits, whole numbers within -largest .. largest, by codes within -127 .. 127 and adds up integers:

- oneDNN's INT8 kernels, where the CPU adds up products in 32 bits (AVX-512 VNNI, AMX): digits up to 127.
- Older vector units (AVX2) add two products in 16 bits first, which cuts sums off: of an unsigned and a
  signed number, 128 * 127 * 2 fits and 255 * 127 * 2 does not. There digits are -64 .. 64, stored as unsigned
  numbers 0 .. 128, and oneDNN multiplies many tokens; FBGEMM few, as it alone is fast for one row.
- torch._int_mm, which is exact everywhere and slow on such CPUs.

Each is tried on the largest sums at first use; what cuts them off, or is not in this torch, is not taken.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

LARGEST_CODE = 127


class Kernel(ABC):
    """One way of multiplying.

    Attributes:
        largest: of digits.
        inputs_at_once: inputs of several groups that are worth a product together where few tokens are
            multiplied, each group in rows of its own; None is all of them.
    """

    largest: int
    inputs_at_once: ClassVar[int | None] = None

    @abstractmethod
    def digits(self, values: Tensor) -> Tensor:
        """Whole numbers [..., I] of any dtype in the format that it takes."""

    @abstractmethod
    def pack(self, codes_OI: Tensor, scale_O: Tensor) -> Any:
        """int8 codes and float32 scales of their rows in the format that it takes."""

    @abstractmethod
    def product(self, digits_MI: Tensor, packed: Any, y_MO: Tensor | None = None) -> Tensor:
        """Add scale * (digits @ codes) to y, or begin one: [M, O] float32. Sums are exact."""


class OneDnn(Kernel):
    """oneDNN.

    Args:
        largest: of digits; 127 as signed numbers, 64 as unsigned ones.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self._zero_point = 0 if largest == LARGEST_CODE else largest

    def digits(self, values: Tensor) -> Tensor:
        made = values.to(torch.int8)  # several times as fast as to uint8
        return made.view(torch.uint8).add_(self._zero_point) if self._zero_point else made

    def pack(self, codes_OI: Tensor, scale_O: Tensor) -> Any:
        weight = torch.ops.onednn.qlinear_prepack(codes_OI.contiguous(), None)
        return weight, scale_O, torch.zeros(len(codes_OI), dtype=torch.int32)

    def product(self, digits_MI: Tensor, packed: Any, y_MO: Tensor | None = None) -> Tensor:
        rows = len(digits_MI)
        if rows == 1:
            # There is no fast kernel of one row for some widths (100 times slower); two take no longer.
            digits_MI = digits_MI.expand(2, -1).contiguous()
        head = (digits_MI, 1.0, self._zero_point, *packed)
        if y_MO is None or rows == 1:
            part = torch.ops.onednn.qlinear_pointwise.default(
                *head, None, 1.0, 0, torch.float32, "none", [], ""
            )
            return part[:rows] if y_MO is None else y_MO.add_(part[:rows])
        tail: tuple[Any, ...] = (None, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], "")
        return torch.ops.onednn.qlinear_pointwise.binary(*head, y_MO, *tail)


class Fbgemm(Kernel):
    """FBGEMM."""

    largest = 64
    inputs_at_once = 640  # it packs 512 together, and a matrix of fewer lies scattered in memory

    def digits(self, values: Tensor) -> Tensor:
        return values.to(torch.float32)  # the product makes unsigned numbers of them

    def pack(self, codes_OI: Tensor, scale_O: Tensor) -> Any:
        engine = torch.backends.quantized.engine
        try:
            torch.backends.quantized.engine = "fbgemm"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about quantised tensors, of which this is the only one
                zeros_O = torch.zeros(len(codes_OI), dtype=torch.int64)
                weight = torch._make_per_channel_quantized_tensor(
                    codes_OI.contiguous(), scale_O.double(), zeros_O, 0
                )
                return torch.ops.quantized.linear_prepack(weight, None)
        finally:
            torch.backends.quantized.engine = engine

    def product(self, digits_MI: Tensor, packed: Any, y_MO: Tensor | None = None) -> Tensor:
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default(
            digits_MI, 1.0, self.largest, packed
        )
        return y if y_MO is None else y_MO.add_(y)


class IntMM(Kernel):
    """torch._int_mm."""

    largest = LARGEST_CODE

    def digits(self, values: Tensor) -> Tensor:
        return values.to(torch.int8)

    def pack(self, codes_OI: Tensor, scale_O: Tensor) -> Any:
        return codes_OI.contiguous().t(), scale_O

    def product(self, digits_MI: Tensor, packed: Any, y_MO: Tensor | None = None) -> Tensor:
        codes_IO, scale_O = packed
        y = torch._int_mm(digits_MI, codes_IO).float().mul_(scale_O)
        return y if y_MO is None else y_MO.add_(y)


def is_exact(kernel: Kernel) -> bool:
    """Whether a kernel is in this torch, and cuts off no sum on this CPU."""
    digits = torch.full((2, 128), float(kernel.largest))
    digits[1] = -kernel.largest
    codes = torch.full((16, 128), LARGEST_CODE, dtype=torch.int8)
    codes[::2, 1::2] = -LARGEST_CODE
    expected = (digits @ codes.float().t()) * 0.5
    try:
        packed = kernel.pack(codes, torch.full((16,), 0.5))
        given = kernel.digits(digits)
        once = kernel.product(given, packed)
        twice = kernel.product(given, packed, once.clone())
        return torch.equal(once, expected) and torch.equal(twice, 2 * expected)
    except (RuntimeError, AttributeError, TypeError):
        return False


@lru_cache(maxsize=1)
def kernels() -> tuple[Kernel, Kernel]:
    """For few tokens, and for many."""
    signed = OneDnn(LARGEST_CODE)
    if is_exact(signed):
        return signed, signed
    candidates: list[Kernel] = [Fbgemm(), OneDnn(64)]
    found = [kernel for kernel in candidates if is_exact(kernel)] or [IntMM()]
    return found[0], found[-1]


__all__ = ["Kernel", "kernels"]
