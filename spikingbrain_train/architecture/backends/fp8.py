"""What FP8 products of linears need of a GPU and of Transformer Engine. No torch.

Transformer Engine's own conditions, as its sources have them (``transformer_engine/pytorch/quantization.py``,
``fp8.py`` in releases before 2.9; ``transformer_engine/common/recipe``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from spikingbrain_train.config.fp8 import Fp8Recipe

Capability = tuple[int, int]
"""Compute capability of an NVIDIA GPU: (9, 0) is Hopper."""

RECIPES_MODULE = "transformer_engine.common.recipe"


@dataclass(frozen=True)
class RecipeNeeds:
    """One way to share scales, on GPUs."""

    recipe_class: str
    """What Transformer Engine calls it."""
    release: str
    """Of Transformer Engine, from which on it is there."""
    capability: Capability
    """That GPUs need at least."""
    gpus: str
    """In words."""
    below: Capability | None = None
    """The first one that does not have it any more."""
    cuda: Capability = (12, 1)
    """Release of CUDA that torch is built for, at least."""
    multiple: int = 16
    """What divides the widths of a product and its tokens, as megatron-core's get_fp8_align_size says."""

    def has(self, capability: Capability) -> bool:
        """Whether GPUs of this compute capability have it."""
        return capability >= self.capability and (self.below is None or capability < self.below)

    def missing(self, capability: Capability, cuda: str | None) -> str | None:
        """What a GPU or its torch lacks, in words behind "needs"; None if nothing.

        Args:
            capability: of the GPU.
            cuda: what torch is built for, ``12.8``.
        """
        if not self.has(capability):
            return f"{self.gpus}, and this GPU has compute capability {_dotted(capability)}"
        release = tuple(int(part) for part in (cuda or "0").split(".")[:2])
        if release < self.cuda:
            return f"torch built for CUDA {_dotted(self.cuda)} or later, and this one is for {cuda}"
        return None


def _dotted(numbers: Capability) -> str:
    return ".".join(str(number) for number in numbers)


RECIPES: Mapping[Fp8Recipe, RecipeNeeds] = MappingProxyType(
    {
        Fp8Recipe.tensorwise: RecipeNeeds(
            "Float8CurrentScaling", "2.2", (8, 9), "a GPU of compute capability 8.9 or later (Ada, Hopper)"
        ),
        Fp8Recipe.blockwise: RecipeNeeds(
            "Float8BlockScaling",
            "2.3",
            (9, 0),
            "a GPU of compute capability 9.0 or later (Hopper)",
            cuda=(12, 9),
        ),
        Fp8Recipe.mxfp8: RecipeNeeds(
            "MXFP8BlockScaling",
            "2.1",
            (10, 0),
            "a GPU of compute capability 10.0 to 11 (Blackwell of data centres)",
            below=(12, 0),
            cuda=(12, 8),
            multiple=32,
        ),
    }
)
"""By the setting ``fp8.recipe``."""
