"""Which source tensors make up which Megatron parameter.

The architecture describes every :class:`~spikingbrain_train.architecture.weights.Weight` once: its name, what
it is made of (roles), how those tensors lie in it, and how it begins where the source does not have it. A
Hugging Face format only spells the roles (:mod:`~spikingbrain_train.conversion.formats`). A role that the
source lacks makes the parameter a new one.

Most weights serve both directions, exactly, because transforms move rows and never touch values. Two sorts
only lead inwards, and models that have them are refused on export: all branches of a layer start from the
source's one attention, and :class:`~spikingbrain_train.architecture.weights.Copies` make experts of its one
feed-forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from spikingbrain_train.architecture.layers import model_weights
from spikingbrain_train.architecture.weights import Copies, Shape, Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.transforms import copy_heads, transform_of
from spikingbrain_train.errors import CheckpointError


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
        """Shapes of the source tensors it is made of."""
        return list(self.weight.shapes)

    @property
    def shape(self) -> Shape:
        """Shape of the Megatron parameter, without vocabulary padding; [experts, rows, columns] if routed."""
        return self.weight.shape

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.weight.numel

    def hf_names(self, names: Mapping[str, str]) -> list[str]:
        """Names of its source tensors in the spelling of a format.

        Raises:
            CheckpointError: the format has no place for this parameter.
        """
        missing = [role for role in self.roles if role not in names]
        if missing:
            raise CheckpointError(f"{self.name} has no counterpart in the requested Hugging Face format")
        return [names[role].format(layer=self.layer) for role in self.roles]

    def fuse(self, parts: list[Tensor]) -> Tensor:
        """The Megatron parameter from its Hugging Face tensors (in :meth:`hf_names` order).

        Heads that a dense source has fewer of are copied.
        """
        if self.weight.source_shapes is not None:
            parts = [
                part if tuple(part.shape) == shape else copy_heads(part, shape[0], self.model)
                for part, shape in zip(parts, self.hf_shapes, strict=True)
            ]
        return transform_of(self.weight).fuse(parts, self.model)

    def split(self, parameter: Tensor) -> list[Tensor]:
        """The Hugging Face tensors (in :meth:`hf_names` order) from the Megatron parameter."""
        return transform_of(self.weight).split(parameter, self.hf_shapes, self.model)


def model_parameters(model: ModelConfig) -> Iterator[Parameter]:
    """Every parameter of ``model``, in forward order: embedding, layer by layer, final norm, output layer.

    Raises:
        ConfigurationError: a kind of mixer or feed-forward is not known.
    """
    for layer, weight in model_weights(model):
        yield Parameter(weight, layer, model)
