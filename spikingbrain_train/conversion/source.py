"""The tensors of a source checkpoint, asked for by role and layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from spikingbrain_train.architecture.weights import Shape
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.hf_format import HfFormat
from spikingbrain_train.conversion.mapping import Parameter, model_parameters
from spikingbrain_train.conversion.safetensors_io import SafetensorsReader
from spikingbrain_train.conversion.weight_values import ALLOW_DAMAGED_WEIGHTS, fault_of
from spikingbrain_train.errors import CheckpointError, ConfigurationError


class Source:
    """A Hugging Face checkpoint asked for by role. Nothing is kept in memory.

    Args:
        reader: its safetensors.
        hf_format: its format.
        model: its sizes.
        allow_damaged_weights: note tensors of NaNs, infinities or zeros in :attr:`damaged` instead of
            refusing them.
    """

    def __init__(
        self,
        reader: SafetensorsReader,
        hf_format: HfFormat,
        model: ModelConfig,
        *,
        allow_damaged_weights: bool = False,
    ) -> None:
        self.reader = reader
        self.hf_format = hf_format
        self.model = model
        self.allow_damaged_weights = allow_damaged_weights
        self.damaged: dict[str, str] = {}
        """Tensors read so far whose numbers are those of no trained model, and what they hold."""
        self._checked: set[str] = set()
        self._shapes: dict[tuple[str, int | None], Shape] = {}
        self._may_be_zero: set[str] = set()
        for parameter in model_parameters(model):
            for role, shape in zip(parameter.roles, parameter.hf_shapes, strict=True):
                self._shapes[role, parameter.layer] = shape
                # A bias, or what a recipe may have started at zero.
                if role.endswith("_bias") or parameter.weight.is_new:
                    self._may_be_zero.add(role)

    def has(self, parameter: Parameter) -> bool:
        """Whether the source holds every tensor that ``parameter`` is made of.

        Raises:
            ConfigurationError: one has another shape.
        """
        asked = [(role, parameter.layer) for role in parameter.roles]
        if not all(each in self._shapes for each in asked):
            return False
        shapes = parameter.hf_shapes
        fewer = parameter.weight.source_shapes or shapes
        for (role, layer), shape, other in zip(asked, shapes, fewer, strict=True):
            stored = self._shapes[role, layer]
            if stored not in (shape, other):
                raise ConfigurationError(
                    f"{parameter.name} is made of {self.name(role, layer)}, whose shape is {list(stored)}, "
                    f"not {list(shape)}; keep the source's sizes, or give the weight another role"
                )
        return True

    def copies_heads(self, parameter: Parameter) -> bool:
        """Whether the source has fewer heads than one of its parameters, which has copies of them."""
        if parameter.weight.source_shapes is None:
            return False
        return [self._shapes[role, parameter.layer] for role in parameter.roles] != parameter.hf_shapes

    def unused(self, parameters: Iterable[Parameter]) -> list[str]:
        """Names of the tensors that none of ``parameters`` is made of."""
        used = {(role, parameter.layer) for parameter in parameters for role in parameter.roles}
        return [self.name(role, layer) for role, layer in self._shapes if (role, layer) not in used]

    def name(self, role: str, layer: int | None = None) -> str:
        """Name of the tensor with ``role`` in ``layer``."""
        return self.hf_format.names[role].format(layer=layer)

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """Number format of the tensors that ``parameter`` is made of."""
        return self.reader.specs[self.name(parameter.roles[0], parameter.layer)].dtype

    def read(self, role: str, layer: int | None = None) -> Tensor:
        """The tensor with ``role`` in ``layer``, on CPU, in its stored shape and dtype.

        Raises:
            CheckpointError: it cannot be read, or holds a NaN, an infinity or, in a matrix or norm, only
                zeros.
        """
        name = self.name(role, layer)
        tensor = self.reader.read(name)
        if name not in self._checked:
            self._checked.add(name)
            fault = fault_of(tensor, may_be_zero=role in self._may_be_zero)
            if fault is not None:
                self._note(name, fault)
        return tensor

    def _note(self, name: str, fault: str) -> None:
        if not self.allow_damaged_weights:
            raise CheckpointError(
                f"{self.reader.file_of(name)}: {name} {fault}; copy the file again from its source, or add "
                f"{ALLOW_DAMAGED_WEIGHTS} if the model is meant to be so"
            )
        self.damaged[name] = fault

    def parts(self, parameter: Parameter) -> list[Tensor]:
        """The tensors that ``parameter`` is made of, in the order of its roles."""
        return [self.read(role, parameter.layer) for role in parameter.roles]
