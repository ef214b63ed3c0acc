"""Reads Megatron ``torch_dist`` checkpoints, any part of a tensor, without process groups and megatron-core.

Both 0.16 and 0.19 write what :class:`MegatronCheckpointReader` reads (the format: checkpoint/data_files.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from isal import isal_zlib
from torch import Tensor

from spikingbrain_train.checkpoint.saved_tensor import (
    LARGE,
    Block,
    bytes_of,
    crc32_of,
    load_tensor,
    values_begin,
)
from spikingbrain_train.errors import CheckpointError, first_line
from spikingbrain_train.runtime.checkpoint_metadata import (
    METADATA_FILE,
    check_shards_are_whole,
    read_metadata,
)
from spikingbrain_train.storage.checkpoint_manifest import read_manifest
from spikingbrain_train.storage.crc32 import combined
from spikingbrain_train.storage.file_blocks import BLOCK_BYTES, forget, read_exactly

if TYPE_CHECKING:  # it takes a second to import: not before a checkpoint is read
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        MetadataIndex,
        TensorStorageMetadata,
    )


class MegatronCheckpointReader:
    """The tensors of one checkpoint folder; opening reads ``.metadata``, :meth:`read` the values.

    A large chunk is never in memory, only what is asked for of it.

    Nothing in the folder is trusted: ``.metadata`` is unpickled against a list of permitted classes, tensors
    with ``weights_only=True``.

    Args:
        folder: of the checkpoint.
        once: whether every part is read once: the system need not keep it in memory, and what is read row
            after row is checked by :meth:`finish` alone.

    Raises:
        CheckpointError: ``.metadata`` is missing, damaged or holds anything unexpected, or a data file is
            missing or truncated.
    """

    def __init__(self, folder: Path, *, once: bool = False):
        self.folder = folder
        self._once = once
        self._manifest = read_manifest(folder)
        if self._manifest is not None:
            self._manifest.check_sizes()
            self._manifest.check_file(METADATA_FILE)
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        metadata = read_metadata(folder)
        self._storage: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.objects = [name for name in metadata.state_dict_metadata if name not in self.tensors]
        """Whatever is no tensor: plain values, pickled. They are never unpickled here."""
        check_shards_are_whole(metadata, folder)
        self._checked: set[tuple[str, int]] = set()
        self._read_so_far: dict[tuple[str, int], _ReadSoFar] = {}
        self._begins: dict[tuple[str, int], int | None] = {}
        """First byte of the values of chunks in their files; None for those that are loaded whole."""
        self._held: tuple[tuple[str, int], Tensor] | None = None
        """The last of those, of which the next part may be asked for."""

    @property
    def paths(self) -> list[Path]:
        """The files that hold them, and what says so."""
        names = {str(info.relative_path) for info in self._storage.values()}
        return [self.folder / name for name in (METADATA_FILE, *sorted(names))]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, optimizer states included where there are any."""
        return sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """The whole tensor ``name`` on CPU, put together from the chunks that ranks wrote.

        Raises:
            CheckpointError: the tensor or a file is missing, truncated or damaged.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.folder} holds no tensor {name}; is it a checkpoint of another architecture?"
            )
        size = self.tensors[name].size
        return self.read_region(name, (0,) * len(size), size)

    def read_region(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The values of :meth:`read_block`."""
        return self.read_block(name, offset, shape).values

    def read_block(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Block:
        """A part of the tensor ``name`` on CPU; rows beyond its end (padding of a vocabulary) are zeros.

        Args:
            name: key of the tensor.
            offset: where the part begins.
            shape: of the part.

        Raises:
            CheckpointError: the tensor or a file is missing, truncated or damaged.
        """
        entry = self.tensors[name]
        inside = torch.Size(
            max(0, min(length, whole - at))
            for at, length, whole in zip(offset, shape, entry.size, strict=True)
        )
        make = torch.empty if inside == torch.Size(shape) else torch.zeros
        region = make(tuple(shape), dtype=entry.properties.dtype)
        covered, crc32, is_whole = 0, None, False
        for chunk in self.chunks_of(name, offset, shape):
            copied, crc32 = self._copy(name, chunk, offset, region)
            covered += copied
            is_whole = copied == region.numel()
        if covered != inside.numel():
            raise CheckpointError(f"{self.folder}: {name} is damaged (its chunks do not add up to its shape)")
        return Block(region, crc32 if is_whole else None)

    def blocks(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Iterator[Block]:
        """:meth:`read_block`, some of the part after the other in the order of its elements.

        Each is of about 8 MB, with as many dimensions as the tensor.
        """
        axis = next((axis for axis, size in enumerate(shape) if size != 1), None)
        if axis is None:
            yield self.read_block(name, offset, shape)
            return
        row_bytes = prod(shape[axis + 1 :]) * self.tensors[name].properties.dtype.itemsize
        at_once = max(1, BLOCK_BYTES // max(row_bytes, 1))
        for first in range(0, shape[axis], at_once):
            rows = min(at_once, shape[axis] - first)
            begin = (*offset[:axis], offset[axis] + first, *offset[axis + 1 :])
            yield self.read_block(name, begin, (*shape[:axis], rows, *shape[axis + 1 :]))

    def chunks_of(
        self, name: str, offset: Sequence[int], shape: Sequence[int]
    ) -> Iterator[ChunkStorageMetadata]:
        """The chunks that a part of a tensor is read from."""
        for chunk in self.tensors[name].chunks:
            if all(
                at < stored_at + stored and stored_at < at + length
                for at, length, stored_at, stored in zip(
                    offset, shape, chunk.offsets, chunk.sizes, strict=True
                )
            ):
                yield chunk

    def read_object(self, name: str) -> bytes:
        """The bytes of what is no tensor, as they were written; they are not unpickled.

        Raises:
            CheckpointError: its file is damaged.
        """
        from torch.distributed.checkpoint.metadata import MetadataIndex

        stored = self._storage.get(MetadataIndex(name))
        if stored is None:
            raise CheckpointError(f"{self.folder} does not say where {name} lies; copy the folder again")
        if self._manifest is not None:
            self._manifest.check_part(stored.relative_path, stored.offset, stored.length)
        with (self.folder / stored.relative_path).open("rb") as file:
            file.seek(stored.offset)
            return file.read(stored.length)

    def check_file(self, name: str) -> None:
        """Hold a small file of the folder against the manifest. Raises CheckpointError."""
        if self._manifest is not None:
            self._manifest.check_file(name)

    def _copy(
        self, name: str, chunk: ChunkStorageMetadata, offset: Sequence[int], region: Tensor
    ) -> tuple[int, int | None]:
        """Copy what a chunk holds of a region, which begins at ``offset``.

        Returns:
            How many elements, and their CRC-32 where it was computed.
        """
        entry = self.tensors[name]
        into, out_of = [], []
        for at, length, stored_at, stored, whole in zip(
            offset, region.shape, chunk.offsets, chunk.sizes, entry.size, strict=True
        ):
            if stored_at + stored > whole:
                raise CheckpointError(
                    f"{self.folder}: {name} is damaged (a chunk lies outside of the tensor)"
                )
            first, end = max(at, stored_at), min(at + length, stored_at + stored)
            into.append(slice(first - at, end - at))
            out_of.append(slice(first - stored_at, end - stored_at))
        info = self._info(name, chunk)
        path = self.folder / info.relative_path
        target = region[tuple(into)]
        begin = self._values_begin(path, info, chunk, entry.properties.dtype)
        if begin is None:
            self._check(info)
            target.copy_(self._load(path, info, name, chunk)[tuple(out_of)])
            return target.numel(), None
        follows = self._follows(info, begin, chunk, out_of, target)
        if follows is None:
            self._check(info)
        crc32 = None
        try:
            with FileIO(path) as file:
                _copy_rows(file, begin, chunk.sizes, out_of, target)
                if follows is not None:
                    crc32 = crc32_of(target)
                    follows.add(crc32, target.nbytes)
                if self._once:
                    forget(file, begin, file.tell() - begin)
        except (OSError, EOFError) as error:
            raise CheckpointError(
                f"{path}: {name} cannot be read ({first_line(error)}); copy the checkpoint again"
            ) from None
        return target.numel(), crc32

    def finish(self, name: str) -> None:
        """Check what has been read of a tensor, if every part is read once: checksums are those of chunks.

        Raises:
            CheckpointError: it is not what was saved.
        """
        for chunk in self.tensors[name].chunks:
            info = self._info(name, chunk)
            if (follows := self._read_so_far.pop(_place(info), None)) is None:
                continue
            path = self.folder / info.relative_path
            before = follows.begin - info.offset
            with FileIO(path) as file:
                crc32 = combined(_crc32(file, info.offset, before), follows.crc32, follows.nbytes)
                rest = before + follows.nbytes
                crc32 = _crc32(file, info.offset + rest, info.length - rest, crc32)
            assert self._manifest is not None
            self._manifest.check_known(info.relative_path, info.offset, info.length, crc32)
            self._checked.add(_place(info))

    def _info(self, name: str, chunk: ChunkStorageMetadata) -> _StorageInfo:
        """Where a chunk lies."""
        from torch.distributed.checkpoint.metadata import MetadataIndex

        stored = self._storage.get(MetadataIndex(name, chunk.offsets))
        if stored is None:
            raise CheckpointError(
                f"{self.folder}: {METADATA_FILE} does not say where {name} lies; copy the folder again"
            )
        if getattr(stored, "transform_descriptors", None):
            raise CheckpointError(f"{self.folder}: {name} is compressed or encrypted, which is not supported")
        return stored

    def _check(self, info: _StorageInfo) -> None:
        """Hold a chunk against the manifest, once."""
        if self._manifest is not None and _place(info) not in self._checked:
            self._manifest.check_part(info.relative_path, info.offset, info.length)
            self._checked.add(_place(info))

    def _follows(
        self,
        info: _StorageInfo,
        begin: int,
        chunk: ChunkStorageMetadata,
        part: Sequence[slice],
        target: Tensor,
    ) -> _ReadSoFar | None:
        """What has been read of a chunk, if a part of it comes next; :meth:`finish` will check it then."""
        place = _place(info)
        if not self._once or self._manifest is None or place in self._checked:
            return None
        row_bytes = torch.Size(chunk.sizes[1:]).numel() * target.element_size()
        is_next = _takes_rows(chunk.sizes, part) and target.is_contiguous()
        so_far = self._read_so_far.get(place) or _ReadSoFar(begin)
        if not is_next or so_far.nbytes != part[0].start * row_bytes:
            self._read_so_far.pop(place, None)
            return None
        return self._read_so_far.setdefault(place, so_far)

    def _values_begin(
        self, path: Path, info: _StorageInfo, chunk: ChunkStorageMetadata, dtype: torch.dtype
    ) -> int | None:
        if chunk.sizes.numel() * dtype.itemsize < LARGE:
            return None
        place = _place(info)
        if place not in self._begins:
            self._begins[place] = values_begin(path, info.offset, info.length, chunk.sizes, dtype)
        return self._begins[place]

    def _load(self, path: Path, info: _StorageInfo, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        """A whole chunk."""
        place = _place(info)
        if self._held is not None and self._held[0] == place:
            return self._held[1]
        self._held = None  # two chunks at a time would be one too many
        try:
            tensor = load_tensor(path, info.offset, info.length)
        except Exception as error:  # a damaged pickle can raise almost anything
            raise CheckpointError(
                f"{path}: {name} cannot be read ({first_line(error)}); copy the checkpoint again"
            ) from None
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name} is not a tensor; copy the checkpoint again")
        if tensor.shape != chunk.sizes or tensor.dtype != self.tensors[name].properties.dtype:
            raise CheckpointError(
                f"{self.folder}: {name} is damaged (a chunk does not have its declared shape and dtype)"
            )
        self._held = (place, tensor)
        return tensor


@dataclass
class _ReadSoFar:
    """How much of the values of a chunk has been read, row after row."""

    begin: int
    """First byte of the values in the file."""
    nbytes: int = 0
    crc32: int = 0

    def add(self, crc32: int, nbytes: int) -> None:
        self.crc32 = combined(self.crc32, crc32, nbytes)
        self.nbytes += nbytes


def _place(info: _StorageInfo) -> tuple[str, int]:
    return str(info.relative_path), int(info.offset)


def _crc32(file: FileIO, offset: int, length: int, crc32: int = 0) -> int:
    """Go on with a checksum over a range of a file. Raises OSError and EOFError."""
    file.seek(offset)
    while length > 0:
        block = bytearray(min(length, BLOCK_BYTES))
        read_exactly(file, memoryview(block))
        crc32 = isal_zlib.crc32(block, crc32)
        length -= len(block)
    return crc32


def _takes_rows(shape: Sequence[int], part: Sequence[slice]) -> bool:
    """Whether a part of a tensor is all of some rows."""
    return all(each == slice(0, size) for each, size in zip(part[1:], shape[1:], strict=True))


def _copy_rows(file: FileIO, begin: int, shape: Sequence[int], part: Sequence[slice], target: Tensor) -> None:
    """Copy a part of a tensor whose values begin at a byte of a file, some of its rows at a time."""
    rows, columns = part[0], tuple(part[1:])
    row = torch.Size(shape[1:])
    row_bytes = row.numel() * target.element_size()
    at_once = max(1, BLOCK_BYTES // max(row_bytes, 1))
    every = (slice(None), *columns)
    file.seek(begin + rows.start * row_bytes)
    if _takes_rows(shape, part) and target.is_contiguous():
        read_exactly(file, bytes_of(target).numpy().data)
        return
    for first in range(0, len(target), at_once):
        number = min(at_once, len(target) - first)
        block = torch.empty((number, *row), dtype=target.dtype)
        read_exactly(file, bytes_of(block).numpy().data)
        target[first : first + number] = block[every]
