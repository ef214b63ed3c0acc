"""What an export writes: runs of pieces, each straight to its place in the safetensors files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch

from spikingbrain_train.checkpoint.saved_tensor import Block
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.conversion.account import Account, Use
from spikingbrain_train.conversion.export_pieces import Piece
from spikingbrain_train.conversion.parts import PART_BYTES, Advance, Parts, Record
from spikingbrain_train.conversion.safetensors_io import TensorPlace
from spikingbrain_train.conversion.weight_values import ALLOW_DAMAGED_WEIGHTS, Inspection, inspected
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage.file_blocks import BLOCK_BYTES, sync_and_forget


class Layout(Protocol):
    """Where the tensors of an export lie: files that several processes can write, in any order."""

    places: dict[str, TensorPlace]

    def begin(self, folder: Path) -> None:
        """Make the files, in their full size; what a killed call wrote into them stays."""

    def write(self, folder: Path, name: str, blocks: Iterable[Block]) -> int:
        """Write the values of a tensor, read them back, and return the CRC-32 of their bytes."""


class ExportParts(Parts):
    """Pieces of an export, in the order of their places.

    Args:
        reader: the checkpoint.
        pieces: all pieces.
        layout: where their tensors lie.
        allow_damaged_weights: let tensors through that hold NaN or infinities.
    """

    def __init__(
        self,
        reader: MegatronCheckpointReader,
        pieces: list[Piece],
        layout: Layout,
        *,
        allow_damaged_weights: bool,
    ) -> None:
        self.reader = reader
        self.layout = layout
        self.allow_damaged_weights = allow_damaged_weights
        self.sizes = []
        self.largest_piece = 0
        self._parts: list[list[Piece]] = []
        for piece in pieces:
            if not self._parts or self.sizes[-1] >= PART_BYTES:
                self._parts.append([])
                self.sizes.append(0)
            nbytes = sum(layout.places[name].spec.nbytes for name in piece.shapes)
            self._parts[-1].append(piece)
            self.sizes[-1] += nbytes
            at_once = min(nbytes, BLOCK_BYTES) if piece.comes_in_blocks else nbytes // piece.num_experts
            self.largest_piece = max(self.largest_piece, at_once)

    def account(self) -> Account:
        """What of the checkpoint is to go where."""
        pieces = [piece for part in self._parts for piece in part]
        specs = {name: place.spec for name, place in self.layout.places.items()}
        return Account(specs, {(name, piece.parameter.name) for piece in pieces for name in piece.shapes})

    def write(self, number: int, folder: Path, advance: Advance) -> Record:
        """The tensors of some pieces."""
        files: dict[str, list[tuple[int, int, int]]] = {}
        damaged: dict[str, str] = {}
        uses: list[Use] = []
        for piece in self._parts[number]:
            for name, blocks in piece.tensors(self.reader):
                place = self.layout.places[name]
                inspection = Inspection()
                crc32 = self.layout.write(
                    folder, name, self._checked(blocks, piece, place.spec.dtype, inspection, advance)
                )
                fault = inspection.fault(may_be_zero=True)
                if fault is not None:
                    damaged[name] = fault
                files.setdefault(place.file, []).append((place.offset, place.spec.nbytes, crc32))
                uses.append(Use(name, piece.parameter.name, crc32, place.spec.nbytes))
            self.reader.finish(piece.parameter.name)
        for name in files:
            sync_and_forget(folder / name)
        return {"files": files, "damaged": damaged, "uses": [use.values() for use in uses]}

    def _checked(
        self,
        blocks: Iterable[Block],
        piece: Piece,
        dtype: torch.dtype,
        inspection: Inspection,
        advance: Advance,
    ) -> Iterator[Block]:
        """Blocks as they are written. Raises CheckpointError where one holds no numbers."""

        def refuse(fault: str) -> CheckpointError:
            self.reader.finish(piece.parameter.name)  # where the file is damaged, that is said
            return CheckpointError(self._damage(piece.parameter.name, fault, dtype))

        cast = (block if block.values.dtype is dtype else Block(block.values.to(dtype)) for block in blocks)
        for block in inspected(cast, inspection, None if self.allow_damaged_weights else refuse):
            yield block
            advance(block.values.nbytes)

    def _damage(self, name: str, fault: str, dtype: torch.dtype) -> str:
        was_narrowed = dtype is torch.float16 and self.reader.tensors[name].properties.dtype is not dtype
        narrow = " in float16, whose largest number is 65504; choose --dtype bfloat16"
        advice = narrow if was_narrowed else "; export an earlier checkpoint of the run"
        return f"{self.reader.folder}: {name} {fault}{advice}, or add {ALLOW_DAMAGED_WEIGHTS} to export it so"
