"""Megatron ``torch_dist`` checkpoints, one tensor at a time, without process groups and megatron-core.

The format is torch.distributed.checkpoint's: ``__*_*.distcp`` files hold tensors back to back, each in
``torch.save`` form; the pickled ``.metadata`` says which chunk of which tensor lies where. megatron-core adds
``metadata.json`` (the backend) and ``common.pt`` (everything that is not a sharded tensor). Both 0.16 and
0.19 read what :class:`MegatronCheckpointWriter` writes, at any tensor and pipeline parallel size;
:class:`MegatronCheckpointReader` reads what either writes.
"""

from __future__ import annotations

import json
import pickle
import zlib
from collections.abc import Sequence
from io import IOBase
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from spikingbrain_train.errors import CheckpointError, first_line
from spikingbrain_train.runtime.checkpoint_metadata import (
    BACKEND,
    BACKEND_FILE,
    COMMON_STATE_FILE,
    METADATA_FILE,
    ONE_KEY_PER_LAYER,
    WHOLE_FILES,
    check_shards_are_whole,
    read_metadata,
)
from spikingbrain_train.storage.checkpoint_manifest import Parts, checksums, read_manifest, write_manifest

_FILE_BYTES = 5 * 1024**3  # a data file is closed when it has grown beyond this


class MegatronCheckpointWriter:
    """Writes one checkpoint folder, tensor after tensor: :meth:`write`, or in parts :meth:`write_chunk`.

    Args:
        folder: existing empty folder, the future ``iter_*``.
        iteration: optimizer steps that the weights have seen.
    """

    def __init__(self, folder: Path, iteration: int = 0):
        self.folder = folder
        self.iteration = iteration
        self._metadata = Metadata(state_dict_metadata={}, storage_data={})
        self._checksums: dict[str, Parts] = {}
        self._file: BinaryIO | None = None
        self._file_number = -1

    def __enter__(self) -> MegatronCheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is not None:
            return
        common = {
            "iteration": self.iteration,
            "content_metadata": dict(ONE_KEY_PER_LAYER),
        }
        torch.save(common, self.folder / COMMON_STATE_FILE)
        backend = {
            "sharded_backend": BACKEND,
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        (self.folder / BACKEND_FILE).write_text(json.dumps(backend), encoding="utf-8")
        with (self.folder / METADATA_FILE).open("wb") as file:
            pickle.dump(self._metadata, file)
        for name in WHOLE_FILES:
            self._checksums[name] = checksums(self.folder / name)
        write_manifest(self.folder, self._checksums)

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
        chunk = chunk.detach().contiguous()
        if chunk.untyped_storage().nbytes() != chunk.nbytes:
            chunk = chunk.clone()  # torch.save writes whole storages
        if self._file is None or self._file.tell() > _FILE_BYTES:
            self._next_file()
        assert self._file is not None
        start = self._file.tell()
        stream = _CheckedWrites(self._file)
        try:
            torch.save(chunk, stream)  # type: ignore[arg-type]
        except RuntimeError:
            if stream.error is not None:
                raise stream.error from None
            raise
        entry = self._metadata.state_dict_metadata.get(name)
        if entry is None:
            entry = TensorStorageMetadata(
                properties=TensorProperties.create_from_tensor(chunk), size=torch.Size(size), chunks=[]
            )
            self._metadata.state_dict_metadata[name] = entry
        assert isinstance(entry, TensorStorageMetadata)
        index = MetadataIndex(name, torch.Size(offset), index=len(entry.chunks))
        entry.chunks.append(ChunkStorageMetadata(offsets=torch.Size(offset), sizes=chunk.shape))
        name_of_file, length = f"__0_{self._file_number}.distcp", self._file.tell() - start
        self._metadata.storage_data[index] = _StorageInfo(name_of_file, offset=start, length=length)
        self._checksums.setdefault(name_of_file, []).append((start, length, stream.crc32))

    def _next_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file_number += 1
        self._file = (self.folder / f"__0_{self._file_number}.distcp").open("wb")


class _CheckedWrites:
    """Passes writes on with their checksum, and remembers an OSError.

    torch.save replaces it by a RuntimeError of its own.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.crc32 = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


class MegatronCheckpointReader:
    """The tensors of one checkpoint folder; opening reads ``.metadata``, :meth:`read` the values.

    Nothing in the folder is trusted: ``.metadata`` is unpickled against a list of permitted classes, tensors
    with ``weights_only=True``.

    Raises:
        CheckpointError: ``.metadata`` is missing, damaged or holds anything unexpected, or a data file is
            missing or truncated.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._manifest = read_manifest(folder)
        if self._manifest is not None:
            self._manifest.check_sizes()
            self._manifest.check_file(METADATA_FILE)
        metadata = read_metadata(folder)
        self._storage: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        check_shards_are_whole(metadata, folder)

    def read(self, name: str) -> Tensor:
        """The whole tensor ``name`` on CPU, put together from the chunks that ranks wrote.

        Raises:
            CheckpointError: the tensor or a file is missing, truncated or damaged.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.folder} holds no tensor {name}; is it a checkpoint of another architecture?"
            )
        entry = self.tensors[name]
        tensor: Tensor | None = None
        covered = 0
        for chunk in entry.chunks:
            part = self._read_chunk(name, chunk)
            if part.shape != chunk.sizes or part.dtype != entry.properties.dtype:
                raise CheckpointError(
                    f"{self.folder}: {name} is damaged (a chunk does not have its declared shape and dtype)"
                )
            if part.shape == entry.size:
                return part
            if tensor is None:
                tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            index = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
            if tensor[index].shape != part.shape:
                raise CheckpointError(
                    f"{self.folder}: {name} is damaged (a chunk lies outside of the tensor)"
                )
            tensor[index] = part
            covered += part.numel()
        if tensor is None or covered != tensor.numel():
            raise CheckpointError(f"{self.folder}: {name} is damaged (its chunks do not add up to its shape)")
        return tensor

    def _read_chunk(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        stored = self._storage.get(MetadataIndex(name, chunk.offsets))
        if stored is None:
            raise CheckpointError(
                f"{self.folder}: {METADATA_FILE} does not say where {name} lies; copy the folder again"
            )
        if getattr(stored, "transform_descriptors", None):
            raise CheckpointError(f"{self.folder}: {name} is compressed or encrypted, which is not supported")
        path = self.folder / stored.relative_path
        if self._manifest is not None:
            self._manifest.check_part(stored.relative_path, stored.offset, stored.length)
        try:
            with path.open("rb") as file:
                view = cast(IO[bytes], _create_file_view(cast(IOBase, file), stored.offset, stored.length))
                tensor = torch.load(view, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{path}: {name} cannot be read ({first_line(error)}); copy the checkpoint again"
            ) from None
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name} is not a tensor; copy the checkpoint again")
        return tensor
