"""A conversion's work in parts, which any process can write in any order, to the same bytes.

A part is on the disk before the journal says so. A call that goes on where another was killed holds what the
journal lists against its checksums, and writes the rest.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import torch

from spikingbrain_train.checkpoint.data_files import StoredChunk
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage.checkpoint_manifest import checksums

PART_BYTES = 512 * 10**6
"""A part is closed when it has grown to this: what a kill can cost each process."""

Record: TypeAlias = dict[str, Any]
"""What a part says of itself, of values that JSON knows. ``files`` maps names in the output folder to the
(offset, bytes, CRC-32) of what it wrote there; ``damaged`` maps tensors that hold no number to what they
hold; the rest is the conversion's own."""

Advance: TypeAlias = Callable[[int], None]
"""Told how many bytes more are done. Raises where the work is to stop."""


class Parts(ABC):
    """The parts of one conversion. Worker processes get it pickled, and find there what they need."""

    sizes: list[int]
    """Bytes of each part, about."""
    part_bytes: int = PART_BYTES
    """About how many a part is to have."""
    largest_piece: int
    """Bytes of the largest tensor, or block of one, that is in memory at once."""

    @abstractmethod
    def write(self, number: int, folder: Path, advance: Advance) -> Record:
        """Write one part into the future output folder and wait until it is on the disk.

        Args:
            number: which, from 0.
            folder: where.
            advance: told of every piece.

        Raises:
            CheckpointError: the source is damaged.
            OSError: the disk is full, or cannot be written.
        """


def is_intact(record: Record, folder: Path) -> bool:
    """Whether what a record says was written still lies in ``folder``."""
    for name, ranges in record["files"].items():
        try:
            found = checksums(folder / name, [(offset, length) for offset, length, _ in ranges])
        except OSError:
            return False
        if found != sorted((offset, length, crc32) for offset, length, crc32 in ranges):
            return False
    return True


def stored_chunks(records: list[Record], planned: Mapping[str, int]) -> list[StoredChunk]:
    """All chunks of a Megatron checkpoint, which are what was planned, no more and no less.

    Args:
        records: of parts that are data files.
        planned: elements of every tensor.

    Raises:
        CheckpointError: they are not.
    """
    chunks = [StoredChunk(**chunk) for record in records for chunk in record["chunks"]]
    elements: dict[str, int] = {}
    for chunk in chunks:
        elements[chunk.name] = elements.get(chunk.name, 0) + prod(chunk.shape)
    for name in planned.keys() | elements.keys():
        if planned.get(name) != elements.get(name):
            raise CheckpointError(
                f"{name} was written with {elements.get(name, 0)} elements of {planned.get(name, 0)}; "
                "nothing is left of it: report this with the command"
            )
    return chunks


def damage_in(records: list[Record]) -> dict[str, str]:
    """Tensors that hold no number, over all parts: name -> what it holds."""
    return {name: fault for record in records for name, fault in record["damaged"].items()}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: sums, and random numbers fitted to them, depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
