"""Row permutations between Hugging Face tensors and Megatron parameters, in both directions.

They move rows and never touch values, so both directions are exact.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spikingbrain_train.architecture.weights import Shape, Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.errors import ConfigurationError


def fuse_rows(parts: list[Tensor], model: ModelConfig) -> Tensor:
    """Stack the parts along dim 0: one stays as it is, gate and up become Megatron's ``linear_fc1``."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=0)


def split_rows(fused: Tensor, shapes: list[Shape], model: ModelConfig) -> list[Tensor]:
    """Undo :func:`fuse_rows`."""
    return list(torch.split(fused, [shape[0] for shape in shapes], dim=0))


def fuse_query_groups(parts: list[Tensor], model: ModelConfig) -> Tensor:
    """q, k and v rows (all heads of each) to Megatron's layout: per group its q heads, its k, its v.

    Weights are [heads * kv_channels, hidden_size], biases [heads * kv_channels]; the result stacks a block of
    ``(heads per group + 2) * kv_channels`` rows for each group.
    """
    groups = parts[-1].shape[0] // model.kv_channels
    blocks = [part.reshape(groups, -1, model.kv_channels, *part.shape[1:]) for part in parts]
    return torch.cat(blocks, dim=1).reshape(-1, *parts[0].shape[1:])


def split_query_groups(fused: Tensor, shapes: list[Shape], model: ModelConfig) -> list[Tensor]:
    """Undo :func:`fuse_query_groups`."""
    groups = shapes[-1][0] // model.kv_channels
    heads_per_group = model.num_attention_heads // groups
    blocks = fused.reshape(groups, heads_per_group + 2, model.kv_channels, *fused.shape[1:])
    parts = torch.split(blocks, [heads_per_group, 1, 1], dim=1)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def interleave_halves(parts: list[Tensor], model: ModelConfig) -> Tensor:
    """Rows of two halves side by side, the first of each, the second of each, ...

    So every tensor-parallel rank holds the same rows of both: x and z of Mamba's input projection.
    """
    (whole,) = parts
    return whole.unflatten(0, (2, -1)).transpose(0, 1).reshape(whole.shape)


def separate_halves(fused: Tensor, shapes: list[Shape], model: ModelConfig) -> list[Tensor]:
    """Undo :func:`interleave_halves`."""
    return [fused.unflatten(0, (-1, 2)).transpose(0, 1).reshape(fused.shape)]


def copy_heads(part: Tensor, rows: int, model: ModelConfig) -> Tensor:
    """Every head of a tensor [heads * kv_channels, ...] as often, side by side, as makes ``rows`` rows."""
    heads = part.unflatten(0, (-1, model.kv_channels))
    return heads.repeat_interleave(rows // part.shape[0], dim=0).flatten(0, 1)


@dataclass(frozen=True)
class Transform:
    """A row permutation between several Hugging Face tensors and one Megatron parameter."""

    fuse: Callable[[list[Tensor], ModelConfig], Tensor]
    """Hugging Face tensors, in the order of the weight's roles, to the Megatron parameter."""
    split: Callable[[Tensor, list[Shape], ModelConfig], list[Tensor]]
    """The Megatron parameter to the Hugging Face tensors, given their shapes."""


TRANSFORMS: Mapping[str, Transform] = {
    "rows": Transform(fuse_rows, split_rows),
    "query_groups": Transform(fuse_query_groups, split_query_groups),
    "interleaved_halves": Transform(interleave_halves, separate_halves),
}
"""By what weights call them in ``layout``."""


def transform_of(weight: Weight) -> Transform:
    """How the tensors of a weight lie in it.

    An entry of :data:`TRANSFORMS`, or, for a kind from outside, the ``package.module:ATTRIBUTE`` that its
    layout names.

    Raises:
        ConfigurationError: there is no such transform.
    """
    if weight.layout in TRANSFORMS:
        return TRANSFORMS[weight.layout]
    module, _, attribute = weight.layout.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"{weight.name} has the layout {weight.layout}, which is none of {', '.join(TRANSFORMS)} and "
            f"cannot be imported ({error}); write another one as package.module:ATTRIBUTE"
        ) from error
    if not isinstance(found, Transform):
        raise ConfigurationError(
            f"{weight.name} has the layout {weight.layout}, which is a {type(found).__name__}; name a "
            f"Transform of spikingbrain_train.models.fused_tensors"
        )
    return found
