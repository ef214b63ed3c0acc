"""What a reshard writes: the shards of each rank, in data files of that rank; one file is one part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path

import torch

from spikingbrain_train.checkpoint.data_files import (
    DataFileWriter,
    StoredChunk,
    StoredObject,
    data_file_name,
)
from spikingbrain_train.checkpoint.saved_tensor import Block
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.conversion.parts import Advance, Parts, Record
from spikingbrain_train.conversion.weight_values import ALLOW_DAMAGED_WEIGHTS, Inspection, inspected
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.planning.shards import Shard
from spikingbrain_train.storage.file_blocks import BLOCK_BYTES

PART_BYTES = 2 * 10**9
"""Larger than the parts of other conversions: hundreds of ranks' files are to become a few."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result."""

    name: str
    size: tuple[int, ...]
    shards: tuple[Shard, ...]
    dtype: torch.dtype
    is_state: bool
    """Whether it is of the optimizer or another state of training, not a weight."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.size) * self.dtype.itemsize


@dataclass
class _DataFile:
    """A part."""

    rank: int
    number: int
    """Which of its rank's."""
    shards: list[tuple[PlannedTensor, Shard]] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)
    """What is no tensor."""
    nbytes: int = 0


class ReshardParts(Parts):
    """The data files of a checkpoint that is laid out anew, rank after rank.

    Args:
        reader: the checkpoint as it is.
        plan: its tensors, in the order in which they are to lie.
        objects: whatever else is carried over; the first rank has it.
        allow_damaged_weights: let tensors through that hold NaN or infinities.
    """

    def __init__(
        self,
        reader: MegatronCheckpointReader,
        plan: Sequence[PlannedTensor],
        objects: Sequence[str],
        *,
        allow_damaged_weights: bool,
    ) -> None:
        self.reader = reader
        self.allow_damaged_weights = allow_damaged_weights
        self.part_bytes = PART_BYTES
        self.largest_piece = 0
        of_rank: dict[int, list[_DataFile]] = {}
        for planned in plan:
            for shard in planned.shards:
                nbytes = prod(shard.shape) * planned.dtype.itemsize
                self.largest_piece = max(self.largest_piece, min(nbytes, BLOCK_BYTES))
                files = of_rank.setdefault(shard.rank, [])
                if not files or files[-1].nbytes + nbytes > PART_BYTES:
                    files.append(_DataFile(shard.rank, len(files)))
                files[-1].shards.append((planned, shard))
                files[-1].nbytes += nbytes
        if objects:
            first = of_rank.setdefault(0, [])
            if not first:
                first.append(_DataFile(0, 0))
            first[-1].objects = list(objects)
        self._files = [file for rank in sorted(of_rank) for file in of_rank[rank]]
        self.sizes = [file.nbytes for file in self._files]

    def write(self, number: int, folder: Path, advance: Advance) -> Record:
        """One data file."""
        part = self._files[number]
        chunks: list[StoredChunk] = []
        damaged: dict[str, str] = {}
        with DataFileWriter(folder, data_file_name(part.number, part.rank)) as file:
            for planned, shard in part.shards:
                axis = next((axis for axis, size in enumerate(shard.shape) if size > 1), 0)
                inspection = Inspection(shard.offset or (0,), axis)
                blocks = self._blocks(planned, shard, inspection, advance)
                chunks.append(
                    file.write_blocks(
                        planned.name, planned.size, shard.offset, shard.shape, planned.dtype, blocks
                    )
                )
                self.reader.finish(planned.name)
                if fault := inspection.fault(may_be_zero=True):
                    damaged[planned.name] = fault
            objects = [file.write_object(name, self.reader.read_object(name)) for name in part.objects]
        written: list[StoredChunk | StoredObject] = [*chunks, *objects]
        return {
            "files": {file.name: [(each.start, each.length, each.crc32) for each in written]},
            "damaged": damaged,
            "chunks": [asdict(chunk) for chunk in chunks],
            "objects": [asdict(each) for each in objects],
        }

    def _blocks(
        self, planned: PlannedTensor, shard: Shard, inspection: Inspection, advance: Advance
    ) -> Iterator[Block]:
        def refuse(fault: str) -> CheckpointError:
            self.reader.finish(planned.name)  # where the file is damaged, that is said
            return CheckpointError(
                f"{self.reader.folder}: {planned.name} {fault}; reshard an earlier checkpoint of the run, or "
                f"add {ALLOW_DAMAGED_WEIGHTS} to copy it as it is"
            )

        blocks = self.reader.blocks(planned.name, shard.offset, shard.shape)
        for block in inspected(blocks, inspection, None if self.allow_damaged_weights else refuse):
            yield block
            advance(block.values.nbytes)


def stored_objects(records: list[Record]) -> list[StoredObject]:
    """Whatever is no tensor, of all parts."""
    return [StoredObject(**each) for record in records for each in record["objects"]]
