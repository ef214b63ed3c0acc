"""Reading the two files of an indexed dataset: ``<prefix>.idx``, where documents begin, and ``<prefix>.bin``,
the tokens of all documents one behind the other.

Why not megatron-core's IndexedDataset: it maps the files into memory, and a mapped file that is cut short
while a run reads it (somebody writes it anew, a snapshot is restored) ends the process with SIGBUS and no
word. An ordinary read says how much it got.
"""

from __future__ import annotations

import os
import struct
import weakref
from typing import Any

import numpy as np

from spikingbrain_train.config.errors import DataError

_HEADER = struct.Struct("<9sQBQQ")
"""Start of an .idx file: magic, version, dtype code, number of sequences, number of document boundaries."""
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES: dict[int, type[np.number]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
"""megatron-core's codes for whole numbers (6 and 7 are float64 and float32)."""


class TokenFile:
    """An indexed dataset, checked when it is opened. Can be sent to worker processes.

    Args:
        prefix: path without .bin/.idx.

    Raises:
        DataError: missing, truncated or mismatched files, or no whole numbers in them.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.dtype, lengths, _ = _read_index(prefix)
        self.num_tokens = int(lengths.sum(dtype=np.int64))
        self._descriptor: int | None = None
        self._check_size(os.path.getsize(self.bin_path))
        if self.num_tokens == 0:
            raise DataError(f"{prefix} holds no tokens: preprocess inputs that have documents")

    @property
    def bin_path(self) -> str:
        """The file with the tokens."""
        return f"{self.prefix}.bin"

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [count] of :attr:`dtype` from position ``start`` on.

        Raises:
            DataError: the file has become shorter since it was opened, or cannot be read.
        """
        tokens = np.empty(count, dtype=self.dtype)
        waiting = tokens.view(np.uint8).data
        place = start * self.dtype.itemsize
        try:
            while waiting:
                done = os.preadv(self._open(), [waiting], place)
                if done == 0:
                    raise DataError(
                        f"{self.bin_path} ends at byte {place}, but was "
                        f"{self.num_tokens * self.dtype.itemsize} bytes long when it was opened: something "
                        "cuts it short while it is in use; restore it and start again"
                    )
                waiting = waiting[done:]
                place += done
        except OSError as error:
            raise DataError(f"cannot read {self.bin_path}: {error.strerror or error}") from error
        return tokens

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.bin_path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            self._check_size(os.fstat(self._descriptor).st_size)
        return self._descriptor

    def _check_size(self, found: int) -> None:
        expected = self.num_tokens * self.dtype.itemsize
        if found != expected:
            raise _truncated(self.prefix, ".bin", expected, found)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}


def num_tokens(dataset: TokenFile) -> int:
    """Number of tokens in an indexed dataset."""
    return dataset.num_tokens


def read_tokens(dataset: TokenFile, start: int, count: int) -> np.ndarray:
    """Tokens [count] int64 from position ``start`` of the concatenated documents.

    Raises:
        DataError: the file was cut short while it was in use.
    """
    return dataset.read(start, count).astype(np.int64)


def document_starts(dataset: TokenFile) -> np.ndarray:
    """Positions [documents + 1] int64 of each document's first token in the concatenated documents, ascending
    and without empty documents; the last entry is the number of tokens."""
    _, lengths, boundaries = _read_index(dataset.prefix)
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.unique(np.concatenate(([0], ends))[boundaries])


def document_at(dataset: TokenFile, position: int) -> int:
    """Number, from 0, of the document that the token at ``position`` belongs to."""
    _, lengths, boundaries = _read_index(dataset.prefix)
    starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))[boundaries]
    return int(np.searchsorted(starts, position, side="right")) - 1


def _read_index(prefix: str) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """dtype of the tokens; length of each sequence [sequences] int32; bounds of the documents [documents + 1]
    int64, in sequences. The index must agree with itself."""
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(prefix + suffix):
            raise DataError(
                f"there is no indexed dataset at {prefix} ({prefix}{suffix} is missing): give the path "
                "without .bin/.idx, and make it with tools/preprocess_data.py"
            )
    try:
        with open(prefix + ".idx", "rb") as file:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                raise _truncated(prefix, ".idx", _HEADER.size, len(header))
            magic, version, code, sequences, boundaries = _HEADER.unpack(header)
            if magic != _MAGIC or version != 1 or not 1 <= code <= 8:
                raise DataError(f"{prefix}.idx is not the index of a Megatron dataset: check the prefix")
            if code not in _DTYPES:
                raise DataError(f"{prefix}.bin holds no whole numbers and so no tokens: check the prefix")
            dtype = np.dtype(_DTYPES[code])
            index_size = _HEADER.size + sequences * (4 + 8) + boundaries * 8
            found = os.path.getsize(prefix + ".idx")
            # A multimodal index has one more byte a sequence.
            if found not in (index_size, index_size + sequences):
                raise _truncated(prefix, ".idx", index_size, found)
            lengths = np.fromfile(file, dtype=np.int32, count=sequences)
            pointers = np.fromfile(file, dtype=np.int64, count=sequences)
            ends = np.fromfile(file, dtype=np.int64, count=boundaries)
    except OSError as error:
        raise DataError(f"cannot read the indexed dataset {prefix}: {error.strerror or error}") from error
    if len(ends) != boundaries:
        raise _truncated(prefix, ".idx", index_size, os.path.getsize(prefix + ".idx"))
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    if (
        (lengths < 0).any()
        or boundaries == 0
        or ends[-1] != sequences
        or (pointers != starts * dtype.itemsize).any()
    ):
        raise DataError(f"{prefix}.idx contradicts itself: preprocess again with --overwrite")
    return dtype, lengths, ends


def _truncated(prefix: str, suffix: str, expected: int, found: int) -> DataError:
    return DataError(
        f"{prefix}{suffix} is {found} bytes long instead of {expected}: it is truncated or of another run, "
        "preprocess again with --overwrite"
    )
