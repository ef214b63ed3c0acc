"""The head of ``<prefix>.idx``, the index of a dataset in megatron-core's format. Without torch or numpy."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

from spikingbrain_train.errors import DataError

_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the numbers' type, number of sequences, number of document boundaries."""
HEADER_BYTES = _HEADER.size
"""Where the lists begin: lengths int32 and offsets int64 of the sequences, boundaries int64."""
_MAGIC = b"MMIDIDX\x00\x00"
_TYPES = {
    1: ("uint8", 1),
    2: ("int8", 1),
    3: ("int16", 2),
    4: ("int32", 4),
    5: ("int64", 8),
    6: ("float64", 8),
    7: ("float32", 4),
    8: ("uint16", 2),
}
"""Name and bytes of a type by megatron-core's code (megatron/core/datasets/indexed_dataset.py, DType)."""
_CODES = {name: code for code, (name, _) in _TYPES.items()}
_VERSION = 1
DOMAINS_SUFFIX = ".domains.npy"
"""Behind the prefix of a dataset: which domain each document is of, where that was asked for."""


@dataclass(frozen=True)
class IndexHeader:
    """What an index says before its lists."""

    type_name: str
    """Of the numbers in the .bin file, as NumPy names it; not of whole numbers in every dataset."""
    item_bytes: int
    """Bytes of one number."""
    sequences: int
    boundaries: int
    """Of documents, one more than there are documents."""

    @property
    def size(self) -> int:
        """Bytes of an index with this header.

        Lengths int32 and offsets int64 of the sequences, boundaries int64. A multimodal index has one more
        byte a sequence.
        """
        return _HEADER.size + self.sequences * (4 + 8) + self.boundaries * 8


def read_header(file: BinaryIO, prefix: str) -> IndexHeader:
    """Read the head of ``prefix``.idx, which ``file`` is at the start of and is behind afterwards.

    Raises:
        DataError: it is cut short, or no index.
        OSError: the file cannot be read.
    """
    head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise truncated(prefix, ".idx", _HEADER.size, os.fstat(file.fileno()).st_size)
    magic, version, code, sequences, boundaries = _HEADER.unpack(head)
    if magic != _MAGIC or version != _VERSION or code not in _TYPES:
        raise DataError(f"{prefix}.idx is not the index of a Megatron dataset: check the prefix")
    return IndexHeader(*_TYPES[code], sequences, boundaries)


@dataclass(frozen=True)
class DatasetSize:
    """How much an indexed dataset holds."""

    documents: int
    tokens: int


def dataset_size(prefix: str) -> DatasetSize:
    """Read it from the head of the index and the length of the other file, however long they are.

    Raises:
        DataError: a file is missing or unreadable, or the index is none.
    """
    try:
        with open(f"{prefix}.idx", "rb") as file:
            header = read_header(file, prefix)
        size = os.path.getsize(f"{prefix}.bin")
    except OSError as error:
        raise DataError(f"cannot read the indexed dataset {prefix}: {error.strerror or error}") from error
    return DatasetSize(max(header.boundaries - 1, 0), size // header.item_bytes)


def header_bytes(type_name: str, sequences: int, boundaries: int) -> bytes:
    """The head of an index; lengths, offsets and boundaries follow it (:attr:`IndexHeader.size`).

    Args:
        type_name: of the numbers in the .bin file, as NumPy names it.
        sequences: their number.
        boundaries: number of document boundaries, one more than there are documents.
    """
    return _HEADER.pack(_MAGIC, _VERSION, _CODES[type_name], sequences, boundaries)


def truncated(prefix: str, suffix: str, expected: int, found: int) -> DataError:
    """The error of a file that is not as long as it ought to be."""
    return DataError(
        f"{prefix}{suffix} is {found} bytes long instead of {expected}: it is truncated or of another run, "
        "preprocess again with --overwrite"
    )
