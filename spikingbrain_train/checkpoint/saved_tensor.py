"""A tensor as torch.save writes it, block by block: written without being whole in memory, and read in part.

torch.save makes a zip archive, uncompressed: a description of the tensor, its values in one piece, and a
directory with checksums behind them. So what stands before the values does not depend on them.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from math import prod
from pathlib import Path
from typing import IO, Any, cast
from zipfile import ZIP_STORED, ZipFile

import torch
from isal import isal_zlib
from torch import Tensor

from spikingbrain_train.storage.crc32 import combined
from spikingbrain_train.storage.file_blocks import FilePart, VerifiedFile

LARGE = 1 << 16
"""Bytes. torch.save writes nothing but values at so many at once."""
_ENTRY, _ENTRY_BYTES = b"PK\x01\x02", 46  # of the archive's directory
_HEADER_BYTES = 30  # before the name of a record
_CRC_AFTER_RECORD = 4  # behind the mark of what follows a record's content
_CRC_IN_ENTRY = 16
_TAIL_BYTES = 56 + 20 + 22  # what ends an archive: for large ones, where that is, for small ones
_IN_EXTRA = 0xFFFFFFFF  # of a number with more bits, which stands among the extra fields of its entry
_EXTRA_OF_LARGE = 1  # kind of the field that holds those
_KEPT_FRAMES = 1024
"""A model has some dozens of shapes, whatever its depth."""


@dataclass(frozen=True)
class Frame:
    """What torch.save writes around values."""

    before: bytes
    _after: bytes
    _checksums: tuple[int, int]
    """Where in ``_after`` the CRC-32 of the values belongs."""

    def after(self, crc32: int) -> bytes:
        """What follows values of that CRC-32."""
        after = bytearray(self._after)
        for place in self._checksums:
            after[place : place + 4] = crc32.to_bytes(4, "little")
        return bytes(after)


class _Recorder:
    """Keeps all that is written but the values."""

    def __init__(self, nbytes: int) -> None:
        self.before, self.after = bytearray(), bytearray()
        self.values = 0
        self._nbytes = nbytes

    def write(self, data: Any) -> int:
        if len(data) == self._nbytes:
            self.values += 1
        else:
            (self.after if self.values else self.before).extend(data)
        return len(data)

    def flush(self) -> None:
        pass


def frame_of(shape: Sequence[int], dtype: torch.dtype) -> Frame | None:
    """What torch.save writes around a contiguous tensor; None for one of less than :data:`LARGE` bytes.

    It depends on shape and dtype alone. The tensor is made, but none of its memory touched.
    """
    return _frame_of(tuple(shape), dtype)


@functools.lru_cache(maxsize=_KEPT_FRAMES)
def _frame_of(shape: tuple[int, ...], dtype: torch.dtype) -> Frame | None:
    nbytes = prod(shape) * dtype.itemsize
    if nbytes < LARGE:
        return None
    recorder = _Recorder(nbytes)
    with _without_checksums():
        torch.save(torch.empty(shape, dtype=dtype), cast(IO[bytes], recorder))
    before, after = recorder.before, recorder.after
    size = int.from_bytes(after[-10:-6], "little")  # of the directory
    at = len(after) - _TAIL_BYTES - size
    if recorder.values != 1 or at < 0:
        return None
    places: tuple[int, int] | None = None
    while after[at : at + 4] == _ENTRY:
        entry = _Entry.read(after, at)
        if entry.length == nbytes:
            places = (_CRC_AFTER_RECORD, at + _CRC_IN_ENTRY)
        else:
            _enter_checksum(before, after, nbytes, entry.begin, entry.length, at)
        at += entry.nbytes
    return None if places is None else Frame(bytes(before), bytes(after), places)


@dataclass(frozen=True)
class _Entry:
    """A record of an archive, as its directory has it."""

    length: int
    """Bytes of its content."""
    begin: int
    """First byte of its header in the archive."""
    nbytes: int
    """Of the entry itself."""

    @classmethod
    def read(cls, directory: bytearray, at: int) -> _Entry:
        stored, length, name, extra, comment, begin = (
            int.from_bytes(directory[at + first : at + first + width], "little")
            for first, width in ((20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4))
        )
        first = at + _ENTRY_BYTES + name
        wide = _large_numbers(directory[first : first + extra])
        length = next(wide) if length == _IN_EXTRA else length
        if stored == _IN_EXTRA:
            next(wide)
        begin = next(wide) if begin == _IN_EXTRA else begin
        return cls(length, begin, _ENTRY_BYTES + name + extra + comment)


def _large_numbers(extra: bytearray) -> Iterator[int]:
    """Numbers of 64 bits among the extra fields of an entry."""
    at = 0
    while at < len(extra):
        kind, length = (int.from_bytes(extra[first : first + 2], "little") for first in (at, at + 2))
        if kind == _EXTRA_OF_LARGE:
            for first in range(at + 4, at + 4 + length, 8):
                yield int.from_bytes(extra[first : first + 8], "little")
        at += 4 + length


def _enter_checksum(
    before: bytearray, after: bytearray, nbytes: int, begin: int, length: int, entry: int
) -> None:
    """Write down the CRC-32 of a small record, which lies before or behind the values."""
    part = before
    if begin >= len(before):
        part, begin = after, begin - len(before) - nbytes
    content = begin + _HEADER_BYTES
    content += sum(int.from_bytes(part[begin + at : begin + at + 2], "little") for at in (26, 28))
    crc32 = isal_zlib.crc32(part[content : content + length]).to_bytes(4, "little")
    place = content + length + _CRC_AFTER_RECORD
    part[place : place + 4] = crc32
    after[entry + _CRC_IN_ENTRY : entry + _CRC_IN_ENTRY + 4] = crc32


@contextlib.contextmanager
def _without_checksums() -> Iterator[None]:
    """Have torch.save not read the values."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class TensorStream:
    """A tensor that is appended to a file in the form of torch.save, block by block.

    Args:
        file: where to.
        frame: of its shape and dtype.
        name: what it is, for the sentence of an error.
    """

    def __init__(self, file: VerifiedFile, frame: Frame, name: str) -> None:
        self._file, self._frame, self._name = file, frame, name
        file.write(frame.before, name)
        self._begin = file.position

    def write(self, block: Tensor) -> None:
        """Append values, in the order of elements. Raises CheckpointError and OSError."""
        self._file.write(bytes_of(block).numpy().data, self._name)

    def end(self, crc32: int) -> int:
        """Write what follows.

        Args:
            crc32: CRC-32 of the values.

        Returns:
            CRC-32 of all that was written.
        """
        length = self._file.position - self._begin
        after = self._frame.after(crc32)
        self._file.write(after, self._name)
        whole = combined(isal_zlib.crc32(self._frame.before), crc32, length)
        return isal_zlib.crc32(after, whole)


def append_tensor(file: VerifiedFile, tensor: Tensor, name: str, crc32: int | None = None) -> int:
    """Append a tensor (on CPU) in the form of torch.save.

    Args:
        file: where to.
        tensor: the values.
        name: what it is, for the sentence of an error.
        crc32: CRC-32 of its bytes, where somebody knows it already.

    Returns:
        CRC-32 of all that was written.

    Raises:
        CheckpointError: other bytes are read back.
        OSError: the disk is full or fails.
    """
    tensor = tensor.detach()
    frame = frame_of(tensor.shape, tensor.dtype)
    if frame is None:
        whole = BytesIO()
        # torch.save writes whole storages, and strides
        torch.save(tensor.clone(memory_format=torch.contiguous_format), whole)
        # Not its buffer: one that a traceback still holds ends Python 3.12.1 when it collects garbage.
        content = whole.getvalue()
        file.write(content, name)
        return isal_zlib.crc32(content)
    stream = TensorStream(file, frame, name)
    stream.write(tensor)
    return stream.end(crc32_of(tensor) if crc32 is None else crc32)


@dataclass(frozen=True)
class Block:
    """Some values, and their checksum where somebody has computed it."""

    values: Tensor
    crc32: int | None = None

    def checksum(self) -> int:
        """CRC-32 of the bytes."""
        return crc32_of(self.values) if self.crc32 is None else self.crc32


def crc32_of(tensor: Tensor) -> int:
    """CRC-32 of the bytes of a tensor on CPU, in the order of its elements."""
    return isal_zlib.crc32(bytes_of(tensor).numpy().data)


def bytes_of(tensor: Tensor) -> Tensor:
    """[bytes] uint8: a tensor on CPU in the order of its elements; a copy only where it is not contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def load_tensor(path: Path, offset: int, length: int) -> Any:
    """What torch.save has written into a part of a file, read with ``weights_only=True``."""
    with BufferedReader(FilePart(path, offset, length)) as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def values_begin(
    path: Path, offset: int, length: int, shape: Sequence[int], dtype: torch.dtype
) -> int | None:
    """First byte in a file of a tensor's values, which lie there in the order of its elements.

    Args:
        path: the file.
        offset: first byte of what torch.save has written.
        length: bytes of that.
        shape: of the tensor.
        dtype: of the tensor.

    Returns:
        None where it is not so: the tensor is to be loaded whole, which says what is wrong with it.
    """
    try:
        with BufferedReader(FilePart(path, offset, length)) as file, ZipFile(file) as archive:
            described, values = (
                next(entry for entry in archive.infolist() if entry.filename.endswith(name))
                for name in ("/data.pkl", "/data/0")
            )
            found = _DescriptionUnpickler(BytesIO(archive.read(described))).load()
            nbytes = prod(shape) * dtype.itemsize
            if not found.is_plain(shape, dtype):
                return None
            if values.file_size != nbytes or values.compress_type != ZIP_STORED:
                return None
            file.seek(values.header_offset)
            header = file.read(_HEADER_BYTES)
    except Exception:  # a damaged pickle can raise almost anything
        return None
    begin = values.header_offset + _HEADER_BYTES
    begin += sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return offset + begin if begin + nbytes <= length else None


@dataclass(frozen=True)
class _Description:
    """What the pickle of a saved tensor says."""

    dtype: torch.dtype
    stored: int
    """Elements that are stored."""
    first: int
    """Which of them is the tensor's first."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def is_plain(self, shape: Sequence[int], dtype: torch.dtype) -> bool:
        """Whether it is of that shape and dtype, and all of what is stored in the order of its elements."""
        if (self.dtype, self.stored, self.first, self.shape) != (dtype, prod(shape), 0, tuple(shape)):
            return False
        strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
        return all(
            size == 1 or stride == expected
            for size, stride, expected in zip(shape, self.strides, strides, strict=True)
        )


_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
}
"""By the classes that pickles of tensors name."""


class _DescriptionUnpickler(pickle.Unpickler):
    """Reads the description of a plain tensor and nothing else: no code of the file runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, int]:
        _, dtype, _, _, number = pid
        return dtype, number


def _describe(
    storage: tuple[torch.dtype, int], first: int, shape: Any, strides: Any, *_: Any
) -> _Description:
    return _Description(*storage, first, tuple(shape), tuple(strides))
