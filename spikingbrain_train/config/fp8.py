"""FP8 products of linears: which number formats, which scales, in which layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from spikingbrain_train.config.setting import SAID, setting


class Fp8Format(str, Enum):
    """Number formats of 8 bits that the linears of layers multiply (arXiv 2209.05433)."""

    e4m3 = "e4m3"
    """Inputs, weights and gradients have 4 bits of exponent and 3 of mantissa, up to 448."""
    hybrid = "hybrid"
    """Inputs and weights as e4m3; gradients have 5 bits of exponent and 2 of mantissa, up to 57344."""


class Fp8Recipe(str, Enum):
    """What shares a scale. All scales are those of the numbers at hand, so that nothing is carried on."""

    tensorwise = "tensorwise"
    """A whole tensor of a micro-batch on a rank: scale = largest number of the format / max |x|."""
    blockwise = "blockwise"
    """128 neighbours of an input or gradient along the sum of a product, 128 x 128 of a weight; scales are
    powers of 2 (DeepSeek-V3, arXiv 2412.19437, section 3.3). On GPUs: Hopper or later, and CUDA 12.9."""
    mxfp8 = "mxfp8"
    """32 neighbours along the sum of a product; scales are powers of 2 (OCP's MX formats, arXiv 2310.10537).
    On GPUs: Blackwell."""


NO_RECIPES: Mapping[str, str] = {
    "delayed": "delayed scales come of steps before, which checkpoints do not have, so that a resumed run "
    "would be another one; tensorwise takes those of the tensors at hand"
}
"""What Megatron has beside them -> why it is not here."""


@dataclass
class Fp8Config:
    """FP8 in the products of linears: forward pass, gradients of inputs, gradients of weights.

    Linears of layers alone, and only while they train; embedding, output projection, routers, low-rank gates,
    norms, attention and evaluations stay in bf16, main weights and sums of gradients in fp32 (docs/fp8.md).
    """

    format: Fp8Format | None = setting(None, resume=SAID)
    """Number formats (Megatron's fp8-format): e4m3 or hybrid; needs precision=bf16 and, on GPUs, Transformer
    Engine. Null multiplies in bf16. CPUs compute the same numbers more slowly, to see what they do to a
    loss."""
    recipe: Fp8Recipe = setting(Fp8Recipe.tensorwise, resume=SAID)
    """What shares a scale (Megatron's fp8-recipe): tensorwise, blockwise or mxfp8."""
    num_layers_at_start_in_bf16: int = setting(0, minimum=0, resume=SAID)
    """First layers of the model whose linears stay in bf16 (Megatron's first-last-layers-bf16)."""
    num_layers_at_end_in_bf16: int = setting(0, minimum=0, resume=SAID)
    """Last layers of the model whose linears stay in bf16."""

    def describe(self, num_layers: int) -> str:
        """A few words on what is multiplied how: ``hybrid, tensorwise, in 26 of 28 layers``."""
        if self.format is None:
            return "off"
        inside = sum(self.in_layer(number, num_layers) for number in range(num_layers))
        return f"{self.format.value}, {self.recipe.value}, in the linears of {inside} of {num_layers} layers"

    def in_layer(self, number: int, num_layers: int) -> bool:
        """Whether the linears of a layer multiply in FP8.

        Args:
            number: of the layer in the whole model, from 0.
            num_layers: layers of the model.
        """
        first, last = self.num_layers_at_start_in_bf16, self.num_layers_at_end_in_bf16
        return self.format is not None and first <= number < num_layers - last
