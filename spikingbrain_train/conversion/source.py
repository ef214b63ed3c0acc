"""The tensors of a source checkpoint, asked for by role and layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spikingbrain_train.architecture.weights import Shape
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.hf_format import HfFormat
from spikingbrain_train.conversion.mapping import Parameter, model_parameters
from spikingbrain_train.conversion.safetensors_io import SafetensorsReader
from spikingbrain_train.conversion.weight_values import ALLOW_DAMAGED_WEIGHTS, Inspection
from spikingbrain_train.errors import CheckpointError, ConfigurationError


@dataclass(frozen=True)
class HeldChunk:
    """A part of a parameter that a source holds."""

    offset: Shape
    values: Tensor
    tensors: dict[str, Tensor]
    """What it is made of."""


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
        self._checked: set[tuple[str, int]] = set()
        self._shapes: dict[tuple[str, int | None], Shape] = {}
        self._names: dict[tuple[str, int | None], str] = {}
        self._whole: dict[str, Parameter] = {}
        self._may_be_zero: set[str] = set()
        parameters = list(model_parameters(model))
        roles = Counter((role, each.layer) for each in parameters for role in each.roles)
        for parameter in parameters:
            names = parameter.tensors(hf_format)
            # A bias, or what a recipe may have started at zero.
            is_bias = parameter.roles[0].endswith("_bias")
            if is_bias or parameter.weight.is_new:
                self._may_be_zero.update(names)
            if parameter.copies is not None or any(
                roles[role, parameter.layer] > 1 for role in parameter.roles
            ):
                self._whole[parameter.name] = parameter
                continue
            for role, name, shape in zip(parameter.roles, names, parameter.hf_shapes, strict=True):
                self._shapes[role, parameter.layer] = shape
                self._names[role, parameter.layer] = name

    def holds(self, parameter: Parameter) -> bool:
        """Whether the source has experts, or one of several branches, just as ``parameter`` is.

        A role does not name them: several of their tensors have the same. They are taken as they are.
        """
        own = self._whole.get(parameter.name)
        return own is not None and (own.roles, own.shape) == (parameter.roles, parameter.shape)

    def held_tensors(self, parameter: Parameter) -> list[str]:
        """Names of the tensors of a parameter that the source holds, routed experts one after the other."""
        return list(self._whole[parameter.name].tensors(self.hf_format))

    def chunks(self, parameter: Parameter, numbers: Iterable[int]) -> Iterator[HeldChunk]:
        """Parts of a parameter that the source holds: routed experts one by one, all else whole.

        Args:
            parameter: one that :meth:`holds`.
            numbers: which experts; else 0.
        """
        own, names = self._whole[parameter.name], self.held_tensors(parameter)
        size = len(own.roles) if own.copies is not None and own.copies.routed else len(names)
        for number in numbers:
            tensors = {name: self._read(name) for name in names[number * size : (number + 1) * size]}
            part = own.join(list(tensors.values()))
            yield HeldChunk((number, *(0,) * (part.dim() - 1)), part, tensors)

    def has(self, parameter: Parameter) -> bool:
        """Whether the source holds every tensor that ``parameter`` is made of.

        Raises:
            ConfigurationError: one has another shape.
        """
        if self.holds(parameter):
            return True
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
        if parameter.weight.source_shapes is None or self.holds(parameter):
            return False
        return [self._shapes[role, parameter.layer] for role in parameter.roles] != parameter.hf_shapes

    def unused(self, parameters: Iterable[Parameter]) -> list[str]:
        """Names of the tensors that none of ``parameters`` is made of."""
        parameters = list(parameters)
        used = {(role, parameter.layer) for parameter in parameters for role in parameter.roles}
        unused = [self.name(role, layer) for role, layer in self._shapes if (role, layer) not in used]
        taken = {parameter.name for parameter in parameters if self.holds(parameter)}
        left = [own for name, own in self._whole.items() if name not in taken]
        return unused + [name for own in left for name in own.tensors(self.hf_format)]

    def has_role(self, role: str, layer: int | None = None) -> bool:
        """Whether exactly one of its tensors is that."""
        return (role, layer) in self._names

    def name(self, role: str, layer: int | None = None) -> str:
        """Name of the tensor with ``role`` in ``layer``."""
        return self._names[role, layer]

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """Number format of the tensors that ``parameter`` is made of."""
        if self.holds(parameter):
            name = next(iter(self._whole[parameter.name].tensors(self.hf_format)))
        else:
            name = self.name(parameter.roles[0], parameter.layer)
        return self.reader.specs[name].dtype

    def read(self, role: str, layer: int | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor with ``role`` in ``layer``, on CPU, in its stored shape and dtype.

        Args:
            role: what it is.
            layer: where; None around the layers.
            rows: those from the first to below the second; None takes all.

        Raises:
            CheckpointError: it cannot be read, or holds a NaN, an infinity or, in a matrix or norm, only
                zeros.
        """
        return self._read(self.name(role, layer), rows)

    def blocks(self, name: str, rows: tuple[int, int] | None = None) -> Iterator[Tensor]:
        """A tensor by its name, or some of its rows, in blocks of rows on CPU.

        Raises:
            CheckpointError: as :meth:`read`, behind the last block.
        """
        first_row = 0 if rows is None else rows[0]
        is_new = (name, first_row) not in self._checked
        inspection = Inspection((first_row,))
        for block in self.reader.blocks(name, rows):
            if is_new:
                inspection.look_at(block)
            yield block
        if is_new:
            self._close(name, first_row, inspection)

    def _read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        tensor = self.reader.read(name, rows)
        first_row = 0 if rows is None else rows[0]
        if (name, first_row) not in self._checked:
            inspection = Inspection((first_row,))
            inspection.look_at(tensor)
            self._close(name, first_row, inspection)
        return tensor

    def _close(self, name: str, first_row: int, inspection: Inspection) -> None:
        self._checked.add((name, first_row))
        # Rows behind the first part may all be those that pad a vocabulary.
        fault = inspection.fault(may_be_zero=name in self._may_be_zero or first_row > 0)
        if fault is not None:
            self._note(name, fault)

    def _note(self, name: str, fault: str) -> None:
        if not self.allow_damaged_weights:
            raise CheckpointError(
                f"{self.reader.file_of(name)}: {name} {fault}; copy the file again from its source, or add "
                f"{ALLOW_DAMAGED_WEIGHTS} if the model is meant to be so"
            )
        self.damaged.setdefault(name, fault)

    def parts(self, parameter: Parameter) -> list[Tensor]:
        """The tensors that ``parameter`` is made of, in the order of its roles."""
        return [self.read(role, parameter.layer) for role in parameter.roles]
