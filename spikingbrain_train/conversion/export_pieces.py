"""What an export is made of: each parameter's tensors, and those that readers of its format want besides."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from spikingbrain_train.architecture.weights import Shape
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.hf_format import HfFormat, Zeros
from spikingbrain_train.conversion.mapping import Parameter, model_parameters


@dataclass(frozen=True)
class Piece:
    """Tensors that are read, written and counted together."""

    parameter: Parameter
    """Whose number format they have, and whose values, unless they are zero."""
    shapes: dict[str, Shape]
    """Shape of each tensor, by its name in the export."""
    group: str
    """Heading under which the report counts them."""
    origin: str
    """Where they come from, in the report's words."""
    is_zero: bool = False

    @property
    def numel(self) -> int:
        """Number of elements of all its tensors."""
        return sum(prod(shape) for shape in self.shapes.values())

    def values(self, reader: MegatronCheckpointReader) -> list[Tensor]:
        """The tensors in the order of ``shapes``, in the stored number format (zeros: float32).

        The vocabulary padding that a tensor-parallel run added is left out.
        """
        if self.is_zero:
            return [torch.zeros(shape) for shape in self.shapes.values()]
        return self.parameter.split(reader.read(self.parameter.name)[: self.parameter.shape[0]])


def export_pieces(model: ModelConfig, hf_format: HfFormat) -> list[Piece]:
    """Everything that an export of ``model`` in a format holds.

    Raises:
        CheckpointError: the format has no place for a parameter.
    """
    pieces = []
    for parameter in model_parameters(model):
        shapes = dict(zip(parameter.hf_names(hf_format.names), parameter.hf_shapes, strict=True))
        pieces.append(Piece(parameter, shapes, parameter.weight.group, "copied"))
    for extra in hf_format.completions(model):
        beside, is_zero = Parameter(extra.beside, extra.layer, model), isinstance(extra, Zeros)
        pieces.append(Piece(beside, {extra.name: extra.shape}, extra.group, extra.origin, is_zero))
    return pieces
