"""Reading the two files of an indexed dataset.

``<prefix>.idx`` says where documents begin, ``<prefix>.bin`` holds the tokens of all documents one behind the
other.

Why not megatron-core's IndexedDataset: it maps the files into memory, and a mapped file that is cut short
while a run reads it (somebody writes it anew, a snapshot is restored) ends the process with SIGBUS and no
word. An ordinary read says how much it got.
"""

from __future__ import annotations

import os
import weakref
from functools import lru_cache

import numpy as np
from isal import isal_zlib

from spikingbrain_train.errors import DataError
from spikingbrain_train.storage.index_format import HEADER_BYTES, IndexHeader, read_header, truncated

_BLOCK_BYTES = 1 << 22
_MOST_OPEN = 64
"""Files that a process holds open: a blend may have more datasets than it may open files."""


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
        offset = start * self.dtype.itemsize
        try:
            file = _opened(self)
            while waiting:
                done = os.preadv(file.descriptor, [waiting], offset)
                if done == 0:
                    raise DataError(
                        f"{self.bin_path} ends at byte {offset}, but was "
                        f"{self.num_tokens * self.dtype.itemsize} bytes long when it was opened: something "
                        "cuts it short while it is in use; restore it and start again"
                    )
                waiting = waiting[done:]
                offset += done
        except OSError as error:
            raise DataError(f"cannot read {self.bin_path}: {error.strerror or error}") from error
        return tokens

    def _check_size(self, found: int) -> None:
        expected = self.num_tokens * self.dtype.itemsize
        if found != expected:
            raise truncated(self.prefix, ".bin", expected, found)


def crc32_of(path: str | os.PathLike[str], most: int | None = None) -> int | None:
    """CRC-32 of a file, or of its first ``most`` bytes; None where it has fewer. Raises OSError."""
    crc, left = 0, os.path.getsize(path) if most is None else most
    with open(path, "rb") as file:
        while left:
            block = file.read(min(left, _BLOCK_BYTES))
            if not block:
                return None
            crc = isal_zlib.crc32(block, crc)
            left -= len(block)
    return crc


class _OpenFile:
    """The tokens of a dataset, open for as long as somebody has this object.

    A file that replaces this one meanwhile is not seen.
    """

    def __init__(self, dataset: TokenFile) -> None:
        self.descriptor = os.open(dataset.bin_path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        dataset._check_size(os.fstat(self.descriptor).st_size)


@lru_cache(maxsize=_MOST_OPEN)
def _opened(dataset: TokenFile) -> _OpenFile:
    return _OpenFile(dataset)


def document_starts(dataset: TokenFile) -> np.ndarray:
    """Positions [documents + 1] int64 of each document's first token in the concatenated documents.

    They ascend, without empty documents; the last entry is the number of tokens.
    """
    _, lengths, boundaries = _read_index(dataset.prefix)
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.unique(np.concatenate(([0], ends))[boundaries])


def document_lengths(prefix: str) -> tuple[np.dtype, np.ndarray]:
    """Type of a token, and how many each document has [documents], read from the index alone.

    The list of lengths is mapped into memory and read once; the long lists behind it only where documents
    have several sequences.

    Raises:
        DataError: missing, truncated or contradictory files.
    """
    header, dtype = _open_index(prefix)
    path = prefix + ".idx"
    lengths = _mapped(path, np.int32, HEADER_BYTES, header.sequences)
    if header.sequences and int(lengths.min()) < 0:
        raise _contradiction(prefix)
    tokens = int(lengths.sum(dtype=np.int64))
    expected, found = tokens * dtype.itemsize, os.path.getsize(prefix + ".bin")
    if found != expected:
        raise truncated(prefix, ".bin", expected, found)
    boundaries = _mapped(path, np.int64, HEADER_BYTES + 12 * header.sequences, header.boundaries)
    if not (len(boundaries) and boundaries[0] == 0 and boundaries[-1] == header.sequences):
        raise _contradiction(prefix)
    if header.boundaries == header.sequences + 1:  # one sequence a document
        return dtype, lengths
    if (np.diff(boundaries) < 0).any():
        raise _contradiction(prefix)
    ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return dtype, np.diff(ends[boundaries])


def _mapped(path: str, kind: type[np.number], offset: int, count: int) -> np.ndarray:
    if count == 0:
        return np.empty(0, dtype=kind)
    return np.asarray(np.memmap(path, dtype=kind, mode="r", offset=offset, shape=(count,)))


def document_at(dataset: TokenFile, position: int) -> int:
    """Number, from 0, of the document that the token at ``position`` belongs to."""
    _, lengths, boundaries = _read_index(dataset.prefix)
    starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))[boundaries]
    return int(np.searchsorted(starts, position, side="right")) - 1


def _read_index(prefix: str) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """What an index says; it must agree with itself.

    Returns:
        dtype of the tokens; length of each sequence [sequences] int32; bounds of the documents
        [documents + 1] int64, in sequences.
    """
    header, dtype = _open_index(prefix)
    try:
        with open(prefix + ".idx", "rb") as file:
            file.seek(HEADER_BYTES)
            lengths = np.fromfile(file, dtype=np.int32, count=header.sequences)
            pointers = np.fromfile(file, dtype=np.int64, count=header.sequences)
            ends = np.fromfile(file, dtype=np.int64, count=header.boundaries)
    except OSError as error:
        raise DataError(f"cannot read the indexed dataset {prefix}: {error.strerror or error}") from error
    if len(ends) != header.boundaries:
        raise truncated(prefix, ".idx", header.size, os.path.getsize(prefix + ".idx"))
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    if (
        (lengths < 0).any()
        or len(ends) == 0
        or ends[0] != 0
        or ends[-1] != header.sequences
        or (np.diff(ends) < 0).any()
        or (pointers != starts * dtype.itemsize).any()
    ):
        raise _contradiction(prefix)
    return dtype, lengths, ends


def _open_index(prefix: str) -> tuple[IndexHeader, np.dtype]:
    """The head of an index, whose files are there and whose lists are as long as it says."""
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(prefix + suffix):
            raise DataError(
                f"there is no indexed dataset at {prefix} ({prefix}{suffix} is missing): give the path "
                "without .bin/.idx, and make it with spikingbrain-preprocess"
            )
    try:
        with open(prefix + ".idx", "rb") as file:
            header = read_header(file, prefix)
        found = os.path.getsize(prefix + ".idx")
    except OSError as error:
        raise DataError(f"cannot read the indexed dataset {prefix}: {error.strerror or error}") from error
    dtype = np.dtype(header.type_name)
    if not np.issubdtype(dtype, np.integer):
        raise DataError(f"{prefix}.bin holds no whole numbers and so no tokens: check the prefix")
    if found not in (header.size, header.size + header.sequences):
        raise truncated(prefix, ".idx", header.size, found)
    return header, dtype


def _contradiction(prefix: str) -> DataError:
    return DataError(f"{prefix}.idx contradicts itself: preprocess again with --overwrite")
