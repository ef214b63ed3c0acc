"""What an export is made of: each parameter's tensors, and those that readers of its format want besides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from spikingbrain_train.architecture.weights import Shape
from spikingbrain_train.checkpoint.saved_tensor import Block
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.import_path import object_at
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.hf_format import HfFormat, Zeros
from spikingbrain_train.conversion.layout_check import check_split
from spikingbrain_train.conversion.mapping import Parameter, model_parameters
from spikingbrain_train.ops.int8_groups import group_scales, group_width, int8_codes
from spikingbrain_train.ops.ternary import magnitude_sum, pack_ternary, ternary_codes, ternary_scales


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
    is_repeated: bool = False
    """Whether the parameter's values are in another piece too."""
    dtype: torch.dtype | None = None
    """Number format of its tensors; None has the parameter's, or what was asked for."""
    encoders: tuple[Callable[[Tensor], Tensor], ...] = ()
    """What makes its tensors of those of the parameter, or of each expert of it, where they are codes, scales
    or in another order: one for each, or one for all; none copies them."""

    @property
    def numel(self) -> int:
        """Number of elements of all its tensors."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def num_experts(self) -> int:
        """How many pieces of it are read one after the other."""
        return self.parameter.shape[0] if self.parameter.is_routed else 1

    @property
    def comes_in_blocks(self) -> bool:
        """Whether no tensor of it is in memory whole."""
        return not self.is_zero and not self.encoders and self.parameter.is_stacked

    def tensors(self, reader: MegatronCheckpointReader) -> Iterator[tuple[str, Iterable[Block]]]:
        """Name and blocks of rows of each tensor, in the stored number format (zeros: float32).

        The vocabulary padding that a tensor-parallel run added is left out.

        Raises:
            CheckpointError: the checkpoint is damaged, or they do not make up the parameter again.
        """
        if self.is_zero:
            yield from ((name, [Block(torch.zeros(shape))]) for name, shape in self.shapes.items())
            return
        names = list(self.shapes)
        size = len(self.parameter.roles) if self.parameter.is_routed else len(names)
        for first in range(0, len(names), size):
            expert = first // size if self.parameter.is_routed else None
            of_one = names[first : first + size]
            yield from (self._rows if self.comes_in_blocks else self._whole)(reader, of_one, expert)

    def _rows(
        self, reader: MegatronCheckpointReader, names: list[str], expert: int | None
    ) -> Iterator[tuple[str, Iterable[Block]]]:
        """Tensors that lie one below the other."""
        row = 0
        for name in names:
            shape = self.shapes[name]
            yield name, self._blocks(reader, shape, row, expert)
            row += shape[0]

    def _blocks(
        self, reader: MegatronCheckpointReader, shape: Shape, row: int, expert: int | None
    ) -> Iterator[Block]:
        name, offset = self.parameter.name, (row, *(0,) * len(shape[1:]))
        if expert is None:
            yield from reader.blocks(name, offset, shape)
            return
        for block in reader.blocks(name, (expert, *offset), (1, *shape)):
            yield Block(block.values[0], block.crc32)

    def _whole(
        self, reader: MegatronCheckpointReader, names: list[str], expert: int | None
    ) -> Iterator[tuple[str, Iterable[Block]]]:
        """Tensors whose rows are mixed, or rounded."""
        shape = self.parameter.shape
        offset = (expert or 0, *(0,) * (len(shape) - 1))
        stored = reader.read_region(self.parameter.name, offset, shape if expert is None else (1, *shape[1:]))
        parts = self.parameter.separate(stored)
        check_split(self.parameter, stored, parts)
        if self.encoders:
            encoders = self.encoders * (len(parts) // len(self.encoders))
            parts = [encode(part) for encode, part in zip(encoders, parts, strict=True)]
        yield from ((name, [Block(part)]) for name, part in zip(names, parts, strict=True))


def _int8_codes(size: int, weight: Tensor) -> Tensor:
    return int8_codes(weight, group_scales(weight, size)).to(torch.int8)


def _int8_scales(size: int, weight: Tensor, *, is_column: bool) -> Tensor:
    scales = group_scales(weight, size)
    return scales.unsqueeze(-1) if is_column else scales


def _ternary_scale(weight: Tensor) -> Tensor:
    return ternary_scales(magnitude_sum(weight), weight.numel(), weight.dtype)


def _packed(weight: Tensor) -> Tensor:
    return pack_ternary(ternary_codes(weight, _ternary_scale(weight)))


def _stored_scale(weight: Tensor, *, is_reciprocal: bool) -> Tensor:
    scale = _ternary_scale(weight).reshape(1)
    return scale.reciprocal() if is_reciprocal else scale


def export_pieces(model: ModelConfig, hf_format: HfFormat) -> list[Piece]:
    """Everything that an export of ``model`` in a format holds.

    Raises:
        CheckpointError: the format has no place for a parameter.
    """
    pieces = []
    for parameter in model_parameters(model):
        shapes = parameter.tensors(hf_format)
        pieces += _pieces(parameter, shapes, hf_format, model)
    for extra in hf_format.completions(model):
        beside, is_zero = Parameter(extra.beside, extra.layer, model), isinstance(extra, Zeros)
        pieces.append(Piece(beside, {extra.name: extra.shape}, extra.group, extra.origin, is_zero, True))
    return pieces


def _pieces(
    parameter: Parameter, shapes: dict[str, Shape], hf_format: HfFormat, model: ModelConfig
) -> list[Piece]:
    """A parameter as it is, or codes and scales of it; or both it and scales."""
    group = parameter.weight.group
    if hf_format.file_writer is not None:
        return object_at(f"{hf_format.file_writer}:pieces")(parameter, shapes, hf_format, model)
    if hf_format.packs_ternary(parameter.weight, model):
        packed: dict[str, Shape] = {name: (rows // 4, inputs) for name, (rows, inputs) in shapes.items()}
        of_matrices: dict[str, Shape] = dict.fromkeys(hf_format.scale_names(list(shapes)), (1,))
        return [
            Piece(parameter, packed, group, "rounded to ternary", dtype=torch.uint8, encoders=(_packed,)),
            Piece(
                parameter,
                of_matrices,
                "scales of ternary weights",
                "mean magnitude of each matrix",
                is_repeated=True,
                dtype=torch.float32,
                encoders=(partial(_stored_scale, is_reciprocal=hf_format.divides_by_ternary_scales),),
            ),
        ]
    size = hf_format.int8_group(parameter.weight, model)
    if size is None:
        return [Piece(parameter, shapes, group, "copied")]
    scales: dict[str, Shape] = {}
    keeps_weights = hf_format.keeps_weights_beside_scales
    for name, (rows, inputs) in zip(hf_format.scale_names(list(shapes)), shapes.values(), strict=True):
        groups = inputs // group_width(size, inputs)
        scales[name] = (rows, groups, 1) if keeps_weights else (rows, groups)
    of_scales = Piece(
        parameter,
        scales,
        "scales of INT8 weights",
        "largest weight of each group",
        is_repeated=True,
        dtype=None if keeps_weights else torch.bfloat16,
        encoders=(partial(_int8_scales, size, is_column=keeps_weights),),
    )
    if keeps_weights:
        return [Piece(parameter, shapes, group, "copied"), of_scales]
    codes = Piece(
        parameter, shapes, group, "rounded to INT8", dtype=torch.int8, encoders=(partial(_int8_codes, size),)
    )
    return [codes, of_scales]
