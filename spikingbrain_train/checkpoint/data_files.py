"""Writes Megatron ``torch_dist`` checkpoints, one tensor at a time, without process groups and megatron-core.

The format is torch.distributed.checkpoint's: ``__*_*.distcp`` files hold tensors back to back, each in
``torch.save`` form; the pickled ``.metadata`` says which chunk of which tensor lies where. megatron-core adds
``metadata.json`` (the backend) and ``common.pt`` (everything that is not a sharded tensor). Both 0.16 and
0.19 read what :class:`MegatronCheckpointWriter` writes, at any tensor and pipeline parallel size.
"""

from __future__ import annotations

import json
import pickle
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikingbrain_train.checkpoint.saved_tensor import Block, TensorStream, append_tensor, frame_of
from spikingbrain_train.runtime.checkpoint_metadata import (
    BACKEND,
    BACKEND_FILE,
    COMMON_STATE_FILE,
    METADATA_FILE,
    ONE_KEY_PER_LAYER,
    WHOLE_FILES,
)
from spikingbrain_train.storage.checkpoint_manifest import Parts, checksums, write_manifest
from spikingbrain_train.storage.crc32 import combined
from spikingbrain_train.storage.file_blocks import VerifiedFile, sync_and_forget

if TYPE_CHECKING:  # it takes a second to import: not before a checkpoint is completed
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata

_FILE_BYTES = 5 * 1024**3  # a data file is closed when it has grown beyond this


@dataclass(frozen=True)
class StoredChunk:
    """A part of a tensor, and where it lies."""

    name: str
    """Key of the tensor."""
    size: tuple[int, ...]
    """Shape of the whole tensor."""
    offsets: tuple[int, ...]
    """Where in it the part begins."""
    shape: tuple[int, ...]
    """Of the part."""
    dtype: str
    """``bfloat16``."""
    file: str
    start: int
    """First byte in the file."""
    length: int
    """Bytes there."""
    crc32: int
    """Of those."""


@dataclass(frozen=True)
class StoredObject:
    """What is no tensor, and where it lies."""

    name: str
    file: str
    start: int
    """First byte in the file."""
    length: int
    crc32: int


class ChunkStream:
    """A chunk that is written in blocks. Made by :meth:`DataFileWriter.begin_chunk`."""

    def __init__(self, stream: TensorStream, file: VerifiedFile, begun: StoredChunk) -> None:
        self._stream, self._file, self._begun = stream, file, begun

    def write(self, block: Tensor) -> None:
        """Append values (on CPU), in the order of elements. Raises CheckpointError and OSError."""
        self._stream.write(block)

    def end(self, crc32: int) -> StoredChunk:
        """The chunk, whose values have this CRC-32."""
        whole = self._stream.end(crc32)
        return replace(self._begun, length=self._file.position - self._begun.start, crc32=whole)


class DataFileWriter:
    """Writes one file of chunks, chunk after chunk; it is on the disk when the body of ``with`` ends.

    Whatever is written is read back and compared.

    Args:
        folder: existing folder, the future ``iter_*``.
        name: of the file, which is replaced.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        (folder / name).unlink(missing_ok=True)
        self._file = VerifiedFile(folder / name)

    def __enter__(self) -> DataFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, traceback)
        if kind is None:
            sync_and_forget(self.folder / self.name)

    @property
    def nbytes(self) -> int:
        """Bytes so far."""
        return self._file.position

    def begin_chunk(
        self, name: str, size: Sequence[int], offsets: Sequence[int], shape: Sequence[int], dtype: torch.dtype
    ) -> ChunkStream | None:
        """Append a part of the tensor ``name`` whose values follow; None where it is written whole only.

        Args:
            name: key of the tensor.
            size: shape of the whole tensor.
            offsets: where in it the part begins.
            shape: of the part, with as many dimensions as the whole.
            dtype: number format.
        """
        if (frame := frame_of(shape, dtype)) is None:
            return None
        begun = self._at(name, size, offsets, shape, dtype)
        return ChunkStream(TensorStream(self._file, frame, name), self._file, begun)

    def write_chunk(
        self,
        name: str,
        size: Sequence[int],
        offsets: Sequence[int],
        chunk: Tensor,
        crc32: int | None = None,
    ) -> StoredChunk:
        """Append a part (on CPU) of the tensor ``name``.

        Args:
            name: key of the tensor.
            size: shape of the whole tensor.
            offsets: where in it the part begins.
            chunk: the part, with as many dimensions as the whole.
            crc32: CRC-32 of its bytes, where somebody knows it already.

        Raises:
            CheckpointError: other bytes are read back.
            OSError: the disk is full or fails.
        """
        begun = self._at(name, size, offsets, chunk.shape, chunk.dtype)
        whole = append_tensor(self._file, chunk, name, crc32)
        return replace(begun, length=self._file.position - begun.start, crc32=whole)

    def write_blocks(
        self,
        name: str,
        size: Sequence[int],
        offsets: Sequence[int],
        shape: Sequence[int],
        dtype: torch.dtype,
        blocks: Iterable[Block],
    ) -> StoredChunk:
        """Append a part of the tensor ``name`` that comes in blocks.

        Args:
            name: key of the tensor.
            size: shape of the whole tensor.
            offsets: where in it the part begins.
            shape: of the part, with as many dimensions as the whole.
            dtype: number format.
            blocks: all of it (on CPU), in the order of elements.

        Raises:
            CheckpointError: other bytes are read back.
            OSError: the disk is full or fails.
        """
        stream = self.begin_chunk(name, size, offsets, shape, dtype)
        if stream is None:
            values = [block.values.reshape(-1) for block in blocks]
            whole = torch.cat(values) if values else torch.empty(0, dtype=dtype)
            return self.write_chunk(name, size, offsets, whole.view(*shape))
        crc32 = 0
        for block in blocks:
            stream.write(block.values)
            crc32 = combined(crc32, block.checksum(), block.values.nbytes)
        return stream.end(crc32)

    def write_object(self, name: str, content: bytes) -> StoredObject:
        """Append what is no tensor, as bytes that another checkpoint held.

        Raises:
            CheckpointError: other bytes are read back.
            OSError: the disk is full or fails.
        """
        start = self._file.position
        self._file.write(content, name)
        return StoredObject(name, self.name, start, len(content), zlib.crc32(content))

    def _at(
        self, name: str, size: Sequence[int], offsets: Sequence[int], shape: Sequence[int], dtype: torch.dtype
    ) -> StoredChunk:
        return StoredChunk(
            name=name,
            size=tuple(size),
            offsets=tuple(offsets),
            shape=tuple(shape),
            dtype=str(dtype).removeprefix("torch."),
            file=self.name,
            start=self._file.position,
            length=0,
            crc32=0,
        )


def complete_checkpoint(
    folder: Path,
    chunks: Iterable[StoredChunk],
    objects: Iterable[StoredObject] = (),
    *,
    iteration: int | None = 0,
) -> None:
    """Write all that a checkpoint holds beside its data files: what they hold, and their checksums.

    Args:
        folder: the folder of the data files.
        chunks: all tensors in them.
        objects: all else in them.
        iteration: optimizer steps that the weights have seen; None leaves ``common.pt`` as it lies there.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

    metadata = Metadata(state_dict_metadata={}, storage_data={})
    ranges: dict[str, Parts] = {}
    for chunk in chunks:
        stored = _StorageInfo(chunk.file, offset=chunk.start, length=chunk.length)
        dtype = getattr(torch, chunk.dtype)
        add_chunk(metadata, chunk.name, chunk.size, chunk.offsets, chunk.shape, dtype, stored)
        ranges.setdefault(chunk.file, []).append((chunk.start, chunk.length, chunk.crc32))
    for each in objects:
        metadata.state_dict_metadata[each.name] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(each.name)] = _StorageInfo(each.file, each.start, each.length)
        ranges.setdefault(each.file, []).append((each.start, each.length, each.crc32))
    if iteration is not None:
        common = {"iteration": iteration, "content_metadata": dict(ONE_KEY_PER_LAYER)}
        torch.save(common, folder / COMMON_STATE_FILE)
    write_small_files(folder, metadata, ranges)


class MegatronCheckpointWriter:
    """Writes one checkpoint folder, tensor after tensor: :meth:`write`, or in parts :meth:`write_chunk`.

    Args:
        folder: existing empty folder, the future ``iter_*``.
        iteration: optimizer steps that the weights have seen.
    """

    def __init__(self, folder: Path, iteration: int = 0):
        self.folder = folder
        self.iteration = iteration
        self._chunks: list[StoredChunk] = []
        self._file: DataFileWriter | None = None
        self._file_number = -1

    def __enter__(self) -> MegatronCheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.__exit__(kind, error, traceback)
        if kind is None:
            complete_checkpoint(self.folder, self._chunks, iteration=self.iteration)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append ``tensor`` (on CPU) under the key ``name`` as one chunk."""
        self.write_chunk(name, tensor.shape, (0,) * tensor.dim(), tensor)

    def write_chunk(self, name: str, size: Sequence[int], offset: Sequence[int], chunk: Tensor) -> None:
        """Append a part (on CPU) of the tensor ``name``, whose other parts come in further calls.

        Args:
            name: key of the tensor.
            size: shape of the whole tensor.
            offset: where in it the part begins.
            chunk: the part, with as many dimensions as the whole.
        """
        if self._file is None or self._file.nbytes > _FILE_BYTES:
            if self._file is not None:
                self._file.__exit__(None, None, None)
            self._file_number += 1
            self._file = DataFileWriter(self.folder, data_file_name(self._file_number))
        self._chunks.append(self._file.write_chunk(name, size, offset, chunk))


def data_file_name(number: int, rank: int = 0) -> str:
    """Name of a file of chunks of a rank, counted from 0."""
    return f"__{rank}_{number}.distcp"


def add_chunk(
    metadata: Metadata,
    name: str,
    size: Sequence[int],
    offset: Sequence[int],
    shape: Sequence[int],
    dtype: torch.dtype,
    stored: _StorageInfo,
) -> None:
    """Enter a part of the tensor ``name``, of shape ``size``, that has been written where ``stored`` says."""
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    entry = metadata.state_dict_metadata.get(name)
    if entry is None:
        properties = TensorProperties(dtype=dtype)
        entry = TensorStorageMetadata(properties=properties, size=torch.Size(size), chunks=[])
        metadata.state_dict_metadata[name] = entry
    assert isinstance(entry, TensorStorageMetadata)
    index = MetadataIndex(name, torch.Size(offset), index=len(entry.chunks))
    entry.chunks.append(ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(shape)))
    metadata.storage_data[index] = stored


def write_small_files(folder: Path, metadata: Metadata, written: dict[str, Parts]) -> None:
    """Complete a folder whose shards and ``common.pt`` are written: backend, ``.metadata``, manifest.

    Args:
        folder: of the checkpoint.
        metadata: of its shards.
        written: checksums of the files of shards.
    """
    backend = {
        "sharded_backend": BACKEND,
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (folder / BACKEND_FILE).write_text(json.dumps(backend), encoding="utf-8")
    with (folder / METADATA_FILE).open("wb") as file:
        pickle.dump(metadata, file)
    of_whole_files = {name: checksums(folder / name) for name in WHOLE_FILES}
    write_manifest(folder, written | of_whole_files)
