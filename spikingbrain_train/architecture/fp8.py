"""Which products of a model are FP8 ones, and how many of its FLOPs those are. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.linear_transforms import Projection

FP8_PROJECTIONS = frozenset(
    {Projection.qkv, Projection.attention_output, Projection.mlp_fc1, Projection.mlp_fc2}
)
"""What is multiplied in FP8 where a run asks for it.

Gates are not: few FLOPs, decays that reach over thousands of tokens, and widths of one number a head, which
no FP8 product takes. DeepSeek-V3 keeps its gates, too (arXiv 2412.19437, section 3.3.1)."""


def in_fp8(weight: Weight) -> bool:
    """Whether a weight of a layer is one of those that are multiplied in FP8."""
    projection = weight.projection
    return projection is not None and projection[0] in FP8_PROJECTIONS and len(weight.shapes[0]) == 2


def fp8_weights(weights: Iterable[Weight]) -> list[Weight]:
    """Those among weights of a layer."""
    return [weight for weight in weights if in_fp8(weight)]
