"""Row permutations between Hugging Face tensors and Megatron parameters, in both directions.

They move rows and never touch values, so both directions are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spikingbrain_train.config.model import ModelConfig

Shape = tuple[int, ...]


def fuse_rows(parts: list[Tensor], model: ModelConfig) -> Tensor:
    """Stack the parts along dim 0: one part stays as it is, gate and up projection become Megatron's
    ``linear_fc1``."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=0)


def split_rows(fused: Tensor, shapes: list[Shape], model: ModelConfig) -> list[Tensor]:
    """Undo :func:`fuse_rows`."""
    return list(torch.split(fused, [shape[0] for shape in shapes], dim=0))


def fuse_query_groups(parts: list[Tensor], model: ModelConfig) -> Tensor:
    """q, k and v rows (all q heads, then all k, then all v) to Megatron's layout: per group its q heads, its
    k, its v.

    Weights are [heads * kv_channels, hidden_size], biases [heads * kv_channels]; the result stacks
    ``num_query_groups`` blocks of ``(heads per group + 2) * kv_channels`` rows.
    """
    groups = model.num_query_groups
    blocks = [part.reshape(groups, -1, model.kv_channels, *part.shape[1:]) for part in parts]
    return torch.cat(blocks, dim=1).reshape(-1, *parts[0].shape[1:])


def split_query_groups(fused: Tensor, shapes: list[Shape], model: ModelConfig) -> list[Tensor]:
    """Undo :func:`fuse_query_groups`."""
    heads_per_group = model.num_attention_heads // model.num_query_groups
    blocks = fused.reshape(model.num_query_groups, heads_per_group + 2, model.kv_channels, *fused.shape[1:])
    parts = torch.split(blocks, [heads_per_group, 1, 1], dim=1)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


@dataclass(frozen=True)
class Transform:
    """A row permutation between several Hugging Face tensors and one Megatron parameter."""

    fuse: Callable[[list[Tensor], ModelConfig], Tensor]
    """Hugging Face tensors, in the rule's role order, to the Megatron parameter."""
    split: Callable[[Tensor, list[Shape], ModelConfig], list[Tensor]]
    """The Megatron parameter to the Hugging Face tensors, given their shapes."""


ROWS = Transform(fuse_rows, split_rows)
QUERY_GROUPS = Transform(fuse_query_groups, split_query_groups)
