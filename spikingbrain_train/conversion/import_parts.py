"""What an import writes, parameter by parameter, and the data files that hold it: one file is one part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from isal import isal_zlib
from torch import Tensor

from spikingbrain_train.architecture.initializers import AttentionSize, NearestSubNorm
from spikingbrain_train.architecture.weights import Shape
from spikingbrain_train.checkpoint.data_files import DataFileWriter, StoredChunk, data_file_name
from spikingbrain_train.checkpoint.saved_tensor import bytes_of
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.account import Use
from spikingbrain_train.conversion.layout_check import check_fused, check_joined
from spikingbrain_train.conversion.mapping import Parameter, model_parameters
from spikingbrain_train.conversion.new_parameters import NewParameters
from spikingbrain_train.conversion.parts import PART_BYTES, Advance, Parts, Record
from spikingbrain_train.conversion.report import NEW
from spikingbrain_train.conversion.source import Source
from spikingbrain_train.conversion.upcycling import describe_copies, expert_chunks
from spikingbrain_train.storage.crc32 import combined
from spikingbrain_train.storage.file_blocks import BLOCK_BYTES

CHUNK_BYTES = 256 * 10**6
"""A larger matrix that is one tensor of the source, such as an embedding, is read in parts of this size."""


@dataclass(frozen=True)
class Planned:
    """One parameter of the result."""

    parameter: Parameter
    dtype: torch.dtype
    in_source: bool
    """Whether it is made of the source's tensors; else it is new."""
    is_held: bool = False
    """Whether the source has it just so, experts or branches included."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.parameter.numel * self.dtype.itemsize

    @property
    def num_chunks(self) -> int:
        """In how many pieces it is read and written: experts one by one, a large matrix by rows."""
        parameter = self.parameter
        copies = parameter.copies
        if copies is not None:
            return copies.number if copies.routed and self.in_source else 1
        is_a_matrix = (
            self.in_source
            and not self.is_held
            and len(parameter.roles) == 1
            and len(parameter.shape) == 2
            and parameter.weight.layout == "rows"
            and parameter.weight.source_shapes is None
        )
        return min(-(-self.nbytes // CHUNK_BYTES), parameter.shape[0]) if is_a_matrix else 1

    def rows(self, chunk: int) -> tuple[int, int] | None:
        """The rows of a chunk, None for all or for experts."""
        if self.num_chunks == 1 or self.parameter.copies is not None:
            return None
        each = -(-self.parameter.shape[0] // self.num_chunks)
        return chunk * each, min((chunk + 1) * each, self.parameter.shape[0])


@dataclass(frozen=True)
class Chunk:
    """A piece of a parameter."""

    offset: Shape
    tensor: Tensor
    uses: list[Use] = field(default_factory=list)
    """What it holds of the source."""
    crc32: int | None = None
    """Of its bytes, where that follows from those of the source."""


@dataclass(frozen=True)
class Stack:
    """A piece of a parameter whose tensors lie in it as they are, one below the other."""

    offset: Shape
    shape: Shape
    tensors: list[str]
    """Of the source, from the top."""
    rows: tuple[int, int] | None
    """Those of its one tensor; None for all of all."""


class Converter:
    """Where every parameter of the result comes from, and its values."""

    def __init__(self, source: Source, recipe: ConversionConfig) -> None:
        self.source = source
        self.recipe = recipe
        self.new = NewParameters(source, recipe)

    def plan(self, target: ModelConfig) -> list[Planned]:
        """Every parameter of ``target``, in forward order."""
        plan = []
        dtype = torch.float32
        for parameter in model_parameters(target):
            in_source = self.source.has(parameter)
            if in_source:
                dtype = self.source.dtype(parameter)
            # New ones take the dtype of what precedes them.
            plan.append(Planned(parameter, dtype, in_source, in_source and self.source.holds(parameter)))
        return plan

    def origin(self, planned: Planned) -> str:
        """Where a parameter comes from, in words."""
        if not planned.in_source:
            return NEW + self.new.describe(planned.parameter)
        if planned.is_held:
            return "copied"
        if planned.parameter.copies is not None:
            return describe_copies(planned.parameter, self.recipe.upcycling)
        if self.source.copies_heads(planned.parameter):
            return "copied, keys and values once for every group of their own"
        return "copied"

    def tensors(self, planned: Planned) -> list[str]:
        """Names of the source's tensors that a parameter is made of."""
        if not planned.in_source:
            return []
        parameter = planned.parameter
        if planned.is_held:
            return self.source.held_tensors(parameter)
        return [self.source.name(role, parameter.layer) for role in parameter.roles]

    def is_stacked(self, planned: Planned) -> bool:
        """Whether its pieces are each a :class:`Stack`."""
        parameter = planned.parameter
        if not planned.in_source or not parameter.is_stacked:
            return False
        return planned.is_held or (parameter.copies is None and not self.source.copies_heads(parameter))

    def stack(self, planned: Planned, number: int) -> Stack:
        """A piece of a parameter that is stacked."""
        shape, names, rows = planned.parameter.shape, self.tensors(planned), planned.rows(number)
        offset = (0,) * len(shape)
        if rows is not None:
            offset, shape = (rows[0], *offset[1:]), (rows[1] - rows[0], *shape[1:])
        elif planned.is_held and planned.parameter.is_routed:
            size = len(planned.parameter.roles)
            names = names[number * size : (number + 1) * size]
            offset, shape = (number, *offset[1:]), (1, *shape[1:])
        return Stack(offset, shape, names, rows)

    def chunks(self, planned: Planned, numbers: range) -> Iterator[Chunk]:
        """Some of the pieces of a parameter.

        Raises:
            CheckpointError: the source is damaged, or the layout of a parameter loses something of it.
        """
        parameter = planned.parameter
        if not planned.in_source:
            tensor = self.new.draw(parameter, planned.dtype)
            yield Chunk((0,) * tensor.dim(), tensor)
        elif planned.is_held:
            for held in self.source.chunks(parameter, numbers):
                check_joined(parameter, held.tensors, held.values)
                yield Chunk(held.offset, held.values, _uses(parameter, held.tensors))
        elif parameter.copies is not None:
            parts = self.source.parts(parameter)
            uses = self._uses(planned, parts)
            for offset, tensor in expert_chunks(
                parameter, parts, self.recipe.upcycling, self.recipe.seed, numbers
            ):
                yield Chunk(offset, tensor, uses)
                uses = []
        elif planned.num_chunks > 1:
            for number in numbers:
                rows = planned.rows(number)
                assert rows is not None
                part = self.source.read(parameter.roles[0], parameter.layer, rows)
                uses = self._uses(planned, [part], rows[0])
                yield Chunk((rows[0], 0), part, uses, uses[0].crc32)
        else:
            parts = self.source.parts(parameter)
            fused = parameter.fuse(parts)
            check_fused(parameter, parts, fused)
            uses = self._uses(planned, parts)
            yield Chunk((0,) * fused.dim(), fused, uses, _in_a_row(parameter, uses))

    def _uses(self, planned: Planned, parts: list[Tensor], first_row: int = 0) -> list[Use]:
        return _uses(planned.parameter, dict(zip(self.tensors(planned), parts, strict=True)), first_row)

    def measures_attention(self, plan: list[Planned]) -> list[int]:
        """Layers whose new parameters start at the size of the source's attention output."""
        return [
            planned.parameter.layer
            for planned in plan
            if not planned.in_source
            and isinstance(planned.parameter.weight.init, AttentionSize)
            and planned.parameter.layer is not None
        ]

    def measures_sub_norms(self, plan: list[Planned]) -> list[tuple[int, str]]:
        """Layers and roles of norms that start at sizes of the source."""
        return [
            (planned.parameter.layer, planned.parameter.roles[0])
            for planned in plan
            if not planned.in_source
            and isinstance(planned.parameter.weight.init, NearestSubNorm)
            and planned.parameter.layer is not None
        ]


def _uses(parameter: Parameter, tensors: dict[str, Tensor], first_row: int = 0) -> list[Use]:
    return [
        Use(name, parameter.name, isal_zlib.crc32(bytes_of(part).numpy().data), part.nbytes, first_row)
        for name, part in tensors.items()
    ]


def _in_a_row(parameter: Parameter, uses: list[Use]) -> int | None:
    """CRC-32 of tensors that lie one below the other; None where they are laid out otherwise, or copied."""
    if parameter.weight.layout != "rows" or parameter.weight.source_shapes is not None:
        return None
    return _one_below_the_other(uses)


def _one_below_the_other(uses: list[Use]) -> int:
    crc32 = 0
    for use in uses:
        crc32 = combined(crc32, use.crc32, use.nbytes)
    return crc32


@dataclass(frozen=True)
class _Cut:
    """Chunks of one parameter in one part."""

    planned: Planned
    numbers: range


class ImportParts(Parts):
    """The data files of a Megatron checkpoint.

    Args:
        converter: values.
        plan: parameters in the order in which they are to lie.
    """

    def __init__(self, converter: Converter, plan: list[Planned]) -> None:
        self.converter = converter
        self.sizes = []
        self.largest_piece = 0
        self._parts: list[list[_Cut]] = []
        for planned in plan:
            number, each = planned.num_chunks, planned.nbytes // planned.num_chunks
            at_once = min(each, BLOCK_BYTES) if converter.is_stacked(planned) else each
            self.largest_piece = max(self.largest_piece, at_once)
            for chunk in range(number):
                if not self._parts or self.sizes[-1] >= PART_BYTES:
                    self._parts.append([])
                    self.sizes.append(0)
                cuts = self._parts[-1]
                if cuts and cuts[-1].planned is planned:
                    cuts[-1] = _Cut(planned, range(cuts[-1].numbers.start, chunk + 1))
                else:
                    cuts.append(_Cut(planned, range(chunk, chunk + 1)))
                self.sizes[-1] += each if chunk < number - 1 else planned.nbytes - each * (number - 1)

    def write(self, number: int, folder: Path, advance: Advance) -> Record:
        """One data file."""
        stored: list[StoredChunk] = []
        uses: list[Use] = []
        with DataFileWriter(folder, data_file_name(number)) as file:
            for cut in self._parts[number]:
                is_stacked = self.converter.is_stacked(cut.planned)
                write = self._write_stacks if is_stacked else self._write_chunks
                for chunk, of_chunk in write(file, cut, advance):
                    stored.append(chunk)
                    uses += of_chunk
        return {
            "files": {file.name: [(chunk.start, chunk.length, chunk.crc32) for chunk in stored]},
            "damaged": dict(self.converter.source.damaged),
            "chunks": [asdict(chunk) for chunk in stored],
            "uses": [use.values() for use in uses],
        }

    def _write_chunks(
        self, file: DataFileWriter, cut: _Cut, advance: Advance
    ) -> Iterator[tuple[StoredChunk, list[Use]]]:
        parameter = cut.planned.parameter
        for chunk in self.converter.chunks(cut.planned, cut.numbers):
            yield (
                file.write_chunk(parameter.name, parameter.shape, chunk.offset, chunk.tensor, chunk.crc32),
                chunk.uses,
            )
            advance(chunk.tensor.nbytes)

    def _write_stacks(
        self, file: DataFileWriter, cut: _Cut, advance: Advance
    ) -> Iterator[tuple[StoredChunk, list[Use]]]:
        parameter, dtype = cut.planned.parameter, cut.planned.dtype
        for number in cut.numbers:
            stack = self.converter.stack(cut.planned, number)
            stream = file.begin_chunk(parameter.name, parameter.shape, stack.offset, stack.shape, dtype)
            if stream is None:
                yield from self._write_chunks(file, _Cut(cut.planned, range(number, number + 1)), advance)
                continue
            uses: list[Use] = []
            for name in stack.tensors:
                crc32, nbytes = 0, 0
                for block in self.converter.source.blocks(name, stack.rows):
                    stream.write(block)
                    crc32 = isal_zlib.crc32(bytes_of(block).numpy().data, crc32)
                    nbytes += block.nbytes
                    advance(block.nbytes)
                uses.append(Use(name, parameter.name, crc32, nbytes, stack.rows[0] if stack.rows else 0))
            yield stream.end(_one_below_the_other(uses)), uses
