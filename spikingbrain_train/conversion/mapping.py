"""Which source tensors make up which Megatron parameter.

The architecture describes every :class:`~spikingbrain_train.architecture.weights.Weight` once: its name, what
it is made of (roles), how those tensors lie in it, and how it begins where the source does not have it. A
Hugging Face format only spells the roles (:mod:`~spikingbrain_train.conversion.formats`). A role that the
source lacks makes the parameter a new one.

Weights serve both directions, exactly, because transforms move rows and never touch values. Two sorts begin
as something else than what they are stored as: all branches of a layer start from a dense source's one
attention, and :class:`~spikingbrain_train.architecture.weights.Copies` make experts of its one feed-forward.
So what a parameter begins as (:attr:`Parameter.hf_shapes`, :meth:`Parameter.fuse`) and what an export holds
of it (:meth:`Parameter.tensors`, :meth:`Parameter.join`, :meth:`Parameter.separate`) are asked for apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spikingbrain_train.architecture.layers import model_weights
from spikingbrain_train.architecture.weights import Copies, Shape, Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.hf_format import HfFormat
from spikingbrain_train.models.fused_tensors import copy_heads, transform_of


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter of one model."""

    weight: Weight
    """Its description, under its whole name."""
    layer: int | None
    """0-based; None around the layers."""
    model: ModelConfig

    @property
    def name(self) -> str:
        """Its key in a Megatron checkpoint: the parameter's name, except for routed experts.

        Their keys hold all experts of a layer, whatever the topology.
        """
        return self.weight.name

    @property
    def roles(self) -> tuple[str, ...]:
        """What each of its source tensors is."""
        return self.weight.roles

    @property
    def copies(self) -> Copies | None:
        """How experts repeat the source tensors; None for parameters that hold them once."""
        return self.weight.copies

    @property
    def hf_shapes(self) -> list[Shape]:
        """Shapes of the tensors of a dense source that it is made of."""
        return list(self.weight.shapes)

    @property
    def shape(self) -> Shape:
        """Shape of the Megatron parameter, without vocabulary padding; [experts, rows, columns] if routed."""
        return self.weight.shape

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.weight.numel

    def tensors(self, hf_format: HfFormat) -> dict[str, Shape]:
        """Names and shapes of the tensors that hold it in a format, routed experts one after the other.

        Raises:
            CheckpointError: the format has no place for this parameter.
        """
        names, shapes = hf_format.tensor_names(self.weight, self.layer, self.model), self._whole_shapes()
        if not self.is_routed:
            return dict(zip(names, shapes, strict=True))
        return {
            name.format(expert=expert): shape
            for expert in range(self.shape[0])
            for name, shape in zip(names, shapes, strict=True)
        }

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The Megatron parameter from what an export holds of it, in the order of :meth:`tensors`."""
        transform, size = transform_of(self.weight), len(self.roles)
        if not self.is_routed:
            return transform.fuse(list(tensors), self.model)
        experts = [tensors[first : first + size] for first in range(0, len(tensors), size)]
        return torch.stack([transform.fuse(list(parts), self.model) for parts in experts])

    def separate(self, parameter: Tensor) -> list[Tensor]:
        """Undo :meth:`join`."""
        transform, shapes = transform_of(self.weight), self._whole_shapes()
        if not self.is_routed:
            return transform.split(parameter, shapes, self.model)
        return [part for expert in parameter for part in transform.split(expert, shapes, self.model)]

    @property
    def is_routed(self) -> bool:
        """Whether it holds the routed experts of a layer, each of which is laid out by itself."""
        return self.copies is not None and self.copies.routed

    @property
    def is_stacked(self) -> bool:
        """Whether its tensors, or those of each expert, lie in it as they are, one below the other."""
        return self.weight.layout == "rows"

    def _whole_shapes(self) -> list[Shape]:
        """Of each role, in one expert; shared experts are one wide feed-forward."""
        if self.copies is None or self.copies.routed:
            return self.hf_shapes
        axis, number = self.copies.channel_axis, self.copies.number
        return [(*shape[:axis], shape[axis] * number, *shape[axis + 1 :]) for shape in self.hf_shapes]

    def fuse(self, parts: list[Tensor]) -> Tensor:
        """The Megatron parameter, or one expert of it, from tensors of a dense source in role order.

        Heads that a dense source has fewer of are copied.
        """
        if self.weight.source_shapes is not None:
            parts = [
                part if tuple(part.shape) == shape else copy_heads(part, shape[0], self.model)
                for part, shape in zip(parts, self.hf_shapes, strict=True)
            ]
        return transform_of(self.weight).fuse(parts, self.model)


def model_parameters(model: ModelConfig) -> Iterator[Parameter]:
    """Every parameter of ``model``, in forward order: embedding, layer by layer, final norm, output layer.

    Raises:
        ConfigurationError: a kind of mixer or feed-forward is not known.
    """
    for layer, weight in model_weights(model):
        yield Parameter(weight, layer, model)
