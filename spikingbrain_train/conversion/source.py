"""The tensors of a source checkpoint, asked for by role and layer."""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.hf_config import Family
from spikingbrain_train.conversion.mapping import Parameter, model_parameters
from spikingbrain_train.conversion.safetensors_io import SafetensorsReader


class Source:
    """A Hugging Face checkpoint seen through the mapping table. Nothing is kept in memory.

    Args:
        reader: its safetensors.
        family: its architecture.
        model: its sizes.
    """

    def __init__(self, reader: SafetensorsReader, family: Family, model: ModelConfig) -> None:
        self.reader = reader
        self.family = family
        self.model = model
        self._roles = {
            (role, parameter.layer) for parameter in model_parameters(model) for role in parameter.rule.roles
        }

    def has(self, parameter: Parameter) -> bool:
        """Whether the source holds every tensor that ``parameter`` is made of."""
        return all((role, parameter.layer) in self._roles for role in parameter.rule.roles)

    def name(self, role: str, layer: int | None = None) -> str:
        """Name of the tensor with ``role`` in ``layer``."""
        return self.family.names[role].format(layer=layer)

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """Number format of the tensors that ``parameter`` is made of."""
        return self.reader.specs[self.name(parameter.rule.roles[0], parameter.layer)].dtype

    def read(self, role: str, layer: int | None = None) -> Tensor:
        """The tensor with ``role`` in ``layer``, on CPU, in its stored shape and dtype."""
        return self.reader.read(self.name(role, layer))

    def parts(self, parameter: Parameter) -> list[Tensor]:
        """The tensors that ``parameter`` is made of, in the order of its rule's roles."""
        return [self.read(role, parameter.layer) for role in parameter.rule.roles]
