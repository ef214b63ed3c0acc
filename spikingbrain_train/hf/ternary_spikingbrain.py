"""Ternary weights (BitNet b1.58, arXiv 2402.17764, eq. 1-3): the linear transform "ternary".

Part of the modelling code of a checkpoint; needs torch only. A linear multiplies by -1, 0 and 1 times the
mean magnitude of its matrix. What is stored are the floats that these are made of or, where the entry of
`linear_transforms` is "packed", the numbers themselves, four in a byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .counts_w8aspike import LAST_COUNTS
from .kinds_spikingbrain import LINEAR_TRANSFORMS, Transform
from .linears_spikingbrain import LinearTransform, TransformedLinear
from .products_w8aspike import PackedWeight


class TernaryWeights(LinearTransform):
    """round(W / scale) within -1 .. 1, times scale = mean |W|; the gradient is straight-through."""

    def weight(self, weight: Tensor, whole: Sequence[Tensor]) -> Tensor:
        # Each matrix has a scale of its own, whatever lay beside it in training.
        magnitudes = weight.detach().abs().sum(dtype=torch.float64)
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        scale = (magnitudes / weight.numel()).clamp(min=1e-5).to(exact)
        codes = (weight.detach().to(exact) * scale.reciprocal()).round().clamp(-1, 1)
        rounded = (codes * scale).to(weight.dtype)
        return weight + (rounded - weight).detach() if torch.is_grad_enabled() else rounded


def unpacked(packed: Tensor) -> Tensor:
    """[O, I] int8 of -1, 0 and 1 from [O / 4, I] uint8; two bits hold a number + 1, the lowest first.

    Those of byte [r, i] are rows r, r + O/4, r + O/2 and r + 3 O/4: transformers' quantisation "bitnet".
    """
    codes = packed.new_empty(4, *packed.shape, dtype=torch.int8)
    for number, shift in enumerate((0, 2, 4, 6)):
        codes[number] = (packed >> shift) & 3
    return codes.flatten(0, 1).sub_(1)


class PackedTernaryLinear(nn.Module):
    """A linear that holds ternary numbers, four in a byte, for inference: weights have no gradient.

    Tensors: `weight` uint8 [out / 4, in], `weight_scale` [1], which products are multiplied by, and the
    linear's own bias. INT8 inputs meet the numbers as integers on CPUs (products_w8aspike.py), whose sums are
    exact; other inputs, other devices, and whoever wants a gradient of the input meet them as floats.

    Args:
        linear: in whose place it stands, with all that is done to its input.
    """

    bias: Tensor | None

    def __init__(self, linear: TransformedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if self.out_features % 4:
            raise ValueError(f"{self.out_features} rows of ternary numbers do not fill bytes of four.")
        empty = torch.zeros(self.out_features // 4, self.in_features, dtype=torch.uint8)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_parameter("bias", linear.bias)
        self.names = list(linear.names)
        for name in self.names:
            self.add_module(name, getattr(linear, name))
        transforms = map(linear.get_submodule, self.names)
        others: list[Any] = [each for each in transforms if type(each) is not TernaryWeights]
        self._whole_numbers: str | None = others[0].whole_numbers if len(others) == 1 else None
        self._packed: tuple | None = None

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, four numbers in a byte"

    def float_weight(self, dtype: torch.dtype) -> Tensor:
        """[out, in]: what the numbers stand for."""
        return (unpacked(self.weight) * self.weight_scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out] in x's dtype."""
        if self._whole_numbers is None or not self.multiplies_integers(x):
            for name in self.names:
                x = getattr(self, name).input(x)
            return F.linear(x, self.float_weight(x.dtype), self.bias)
        counts = LAST_COUNTS.of(x, self._whole_numbers, 0.0)
        y = self._packed_weight().product(counts, None, torch.float32).mul_(self.weight_scale)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def multiplies_integers(self, x: Tensor) -> bool:
        """Whether x meets the numbers as integers: rounded to INT8 here, on CPUs, without a gradient."""
        wants_gradient = x.requires_grad and torch.is_grad_enabled()
        is_integer = self._whole_numbers is not None and x.device.type == "cpu" and x.dtype != torch.float64
        return is_integer and not wants_gradient and not torch.compiler.is_compiling()

    def _packed_weight(self) -> PackedWeight:
        """In the format of a kernel: a byte a number, beside the two bits that are stored."""
        version = self.weight.data_ptr(), self.weight._version
        if self._packed is None or self._packed[0] != version:
            ones = torch.ones(self.out_features, 1)  # whole sums; their scale comes afterwards
            self._packed = (version, PackedWeight(lambda: unpacked(self.weight), ones))
        return self._packed[1]

    def __getstate__(self) -> dict:
        # What is packed is made anew, also in copies.
        return {**self.__dict__, "_packed": None}


LINEAR_TRANSFORMS.register(Transform("ternary", TernaryWeights, pack=PackedTernaryLinear))

__all__ = ["PackedTernaryLinear", "TernaryWeights"]
