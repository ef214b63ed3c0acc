"""A Megatron checkpoint with the files of many ranks, written by one process."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from spikingbrain_train.checkpoint.data_files import add_chunk, write_small_files
from spikingbrain_train.checkpoint.saved_tensor import append_tensor
from spikingbrain_train.storage.checkpoint_manifest import Parts
from spikingbrain_train.storage.file_blocks import VerifiedFile

_FILE_BYTES = 5 * 1024**3  # a rank begins another file when one has grown beyond this


class RankFilesWriter:
    """Writes the shards of one checkpoint folder, each into a file of the rank that would write it.

    A file is opened for every chunk and closed again: a topology may have more ranks than a process may have
    open files. ``common.pt`` must lie in the folder when the block ends, which completes the folder.

    Args:
        folder: existing folder, the future ``iter_*``.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._metadata = Metadata(state_dict_metadata={}, storage_data={})
        self._checksums: dict[str, Parts] = {}
        self._files: dict[int, int] = {}

    def __enter__(self) -> RankFilesWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            write_small_files(self.folder, self._metadata, self._checksums)

    @property
    def num_files(self) -> int:
        """Files of shards so far."""
        return len(self._checksums)

    def write_chunk(
        self, rank: int, name: str, size: Sequence[int], offset: Sequence[int], chunk: Tensor
    ) -> None:
        """Append a part (on CPU) of the tensor ``name`` to the file of ``rank``.

        Args:
            rank: whose file.
            name: key of the tensor.
            size: shape of the whole tensor.
            offset: where in it the part begins.
            chunk: the part, with as many dimensions as the whole.
        """
        path = self._file_of(rank)
        with VerifiedFile(path) as file:
            start = file.position
            crc32 = append_tensor(file, chunk, name)
            length = file.position - start
        stored = _StorageInfo(path.name, start, length)
        add_chunk(self._metadata, name, size, offset, chunk.shape, chunk.dtype, stored)
        self._checksums.setdefault(path.name, []).append((start, length, crc32))

    def write_object(self, rank: int, name: str, content: bytes) -> None:
        """Append what is no tensor, as bytes that another checkpoint held."""
        path = self._file_of(rank)
        with VerifiedFile(path) as file:
            start = file.position
            file.write(content, name)
        self._metadata.state_dict_metadata[name] = BytesStorageMetadata()
        self._metadata.storage_data[MetadataIndex(name)] = _StorageInfo(path.name, start, len(content))
        self._checksums.setdefault(path.name, []).append((start, len(content), zlib.crc32(content)))

    def _file_of(self, rank: int) -> Path:
        path = self.folder / f"__{rank}_{self._files.get(rank, 0)}.distcp"
        if path.exists() and path.stat().st_size > _FILE_BYTES:
            self._files[rank] = self._files.get(rank, 0) + 1
            path = self.folder / f"__{rank}_{self._files[rank]}.distcp"
        return path
