"""Safetensors folders, one tensor at a time: :class:`SafetensorsReader` and :class:`SafetensorsFolder`.

Neither ever holds more than the tensor at hand, so memory does not grow with the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spikingbrain_train.checkpoint.saved_tensor import Block, bytes_of
from spikingbrain_train.conversion.hf_folder import INDEX_FILE, SINGLE_FILE, read_weight_map
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage.crc32 import combined
from spikingbrain_train.storage.file_blocks import BLOCK_BYTES, VerifiedFile, forget, read_exactly

_METADATA = "__metadata__"
_LFS_POINTER = b"version https://git-lfs"

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
_WRITTEN_CODES = {**DTYPE_CODES, torch.int8: "I8", torch.uint8: "U8"}

QUANTISER_SCALES = ".weight_quantizer.scales"
"""How the published W8ASpike class names them, below their linear."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a tensor that is, or will be, in a safetensors file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsReader:
    """The tensors of a Hugging Face folder: ``model.safetensors``, or the shards that its index names.

    Opening reads headers only. Shapes and dtypes are known then; values are read by :meth:`read`.

    Raises:
        CheckpointError: no safetensors, a shard is missing or truncated, the index contradicts the shards, or
            a tensor has another dtype than float32, float16 or bfloat16.
    """

    dtypes: Mapping[str, torch.dtype] = DTYPES
    """Those that tensors may have, by what headers call them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.specs: dict[str, TensorSpec] = {}
        self._files: dict[str, Path] = {}
        self._begins: dict[str, int] = {}
        """First byte of each tensor's values in its file."""
        weight_map = read_weight_map(folder)
        for file_name in dict.fromkeys(weight_map.values()) if weight_map else [SINGLE_FILE]:
            self._read_header(folder / file_name)
        for name, file_name in weight_map.items():
            if self._files.get(name) != folder / file_name:
                raise CheckpointError(
                    f"{folder / file_name} does not hold {name}, although {INDEX_FILE} says so; copy the "
                    "folder again from its source"
                )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def paths(self) -> list[Path]:
        """The files that hold them."""
        return list(dict.fromkeys(self._files.values()))

    def file_of(self, name: str) -> Path:
        """The file that holds tensor ``name``."""
        return self._files[name]

    def blocks(self, name: str, rows: tuple[int, int] | None = None) -> Iterator[Tensor]:
        """The tensor ``name``, or some of its rows, in blocks of rows, on CPU.

        Raises:
            CheckpointError: the file cannot be read.
        """
        spec, path = self.specs[name], self._files[name]
        first, end = rows or (0, spec.shape[0] if spec.shape else 1)
        of_row = spec.shape[1:]
        row_bytes = prod(of_row) * spec.dtype.itemsize
        at_once = max(1, BLOCK_BYTES // max(row_bytes, 1))
        begin = self._begins[name] + first * row_bytes
        try:
            with FileIO(path) as file:
                file.seek(begin)
                for row in range(first, end, at_once):
                    block = torch.empty((min(at_once, end - row), *of_row), dtype=spec.dtype)
                    read_exactly(file, bytes_of(block).numpy().data)
                    yield block if spec.shape else block[0]
                    forget(file, begin, file.tell() - begin)
        except (OSError, EOFError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error}); copy the file again") from None

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor ``name`` on CPU, or some of its rows, from the first to below the second."""
        path = self._files[name]
        try:
            # Opened anew for each tensor: closing lets go of the pages that the mapping pulled into memory.
            with safe_open(path, framework="pt", device="cpu") as file:
                if rows is None:
                    return file.get_tensor(name)
                return file.get_slice(name)[rows[0] : rows[1]]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error}); copy the file again") from None

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                    header = file.get_slice(name)
                    shape, code = tuple(header.get_shape()), header.get_dtype()
                    if name in self._files:
                        raise CheckpointError(
                            f"{name} is in both {self._files[name]} and {path}; keep one of them"
                        )
                    if code not in self.dtypes:
                        raise CheckpointError(
                            f"{path}: {name} has dtype {code}; supported are {', '.join(DTYPES)}: save the "
                            "model in one of them, or import the unquantised checkpoint"
                        )
                    self._files[name] = path
                    self.specs[name] = TensorSpec(name, shape, self.dtypes[code])
            self._begins |= _begins_of_values(path)  # safe_open has checked what it says
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; copy the whole folder from its source") from None
        except (SafetensorError, OSError) as error:
            if _is_pickle(path):
                raise CheckpointError(
                    f"{path} is a pickle under the name of a safetensors file, and pickles are never opened "
                    "here, because they can run code; save the model with "
                    "save_pretrained(..., safe_serialization=True)"
                ) from None
            if _begin_of(path, len(_LFS_POINTER)) == _LFS_POINTER:
                raise CheckpointError(
                    f"{path} is a pointer of Git LFS in place of the file; run git lfs pull in its folder"
                ) from None
            raise CheckpointError(
                f"{path} is not a complete safetensors file ({error}); copy it again from its source"
            ) from None


def _begins_of_values(path: Path) -> dict[str, int]:
    """First byte in a safetensors file of the values of every tensor: its header counts from its own end."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != _METADATA}


def _is_pickle(path: Path) -> bool:
    """Whether a file begins as torch.save writes it: a zip archive, or its older magic number."""
    return _begin_of(path, 4) in (b"PK\x03\x04", b"\x80\x02\x8a\x0a")


def _begin_of(path: Path, length: int) -> bytes:
    """The first bytes of a file; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(length)
    except OSError:
        return b""


def has_stored_scales(reader: SafetensorsReader) -> bool:
    """Whether a folder is a published W8ASpike one, which config.json does not tell from the plain form.

    Its weights are ordinary floats; what they are rounded to is stored beside them.
    """
    return any(name.endswith(QUANTISER_SCALES) for name in reader.specs)


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies."""

    spec: TensorSpec
    file: str
    offset: int
    """First byte of its values in the file."""


class SafetensorsFolder:
    """``model.safetensors``, or shards with an index above ``max_shard_size``, written in any order.

    Where each tensor lies follows from the shapes and dtypes alone, so that several processes can write.
    Order tensors by falling dtype size: the format aligns none, and readers expect each to start at a
    multiple of its element size.

    Args:
        specs: every tensor, in the order in which they are to lie.
        max_shard_size: largest size in bytes of a shard's data; a larger single tensor gets its own shard.
    """

    def __init__(self, specs: list[TensorSpec], max_shard_size: int):
        shards: list[list[TensorSpec]] = []
        size = 0
        for spec in specs:
            if not shards or size + spec.nbytes > max_shard_size:
                shards.append([])
                size = 0
            shards[-1].append(spec)
            size += spec.nbytes
        self.nbytes = sum(spec.nbytes for spec in specs)
        self.places: dict[str, TensorPlace] = {}
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        for number, shard in enumerate(shards):
            name = (
                SINGLE_FILE
                if len(shards) == 1
                else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            )
            self._lay_out(name, shard)

    def _lay_out(self, file: str, shard: list[TensorSpec]) -> None:
        header: dict[str, object] = {_METADATA: {"format": "pt"}}
        offsets, end = {}, 0
        for spec in shard:
            offsets[spec.name] = end
            header[spec.name] = {
                "dtype": _WRITTEN_CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [end, end + spec.nbytes],
            }
            end += spec.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # data starts at a multiple of 8 bytes
        self._headers[file] = len(encoded).to_bytes(8, "little") + encoded
        begin = len(self._headers[file])
        self._sizes[file] = begin + end
        for spec in shard:
            self.places[spec.name] = TensorPlace(spec, file, begin + offsets[spec.name])

    def begin(self, folder: Path) -> None:
        """Make the files, in their full size; what a killed call wrote into them stays."""
        for name, header in self._headers.items():
            with (folder / name).open("r+b" if (folder / name).exists() else "w+b") as file:
                file.write(header)
                file.truncate(self._sizes[name])
        if len(self._headers) > 1:
            index = {
                "metadata": {"total_size": self.nbytes},
                "weight_map": {name: place.file for name, place in self.places.items()},
            }
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, folder: Path, name: str, blocks: Iterable[Block]) -> int:
        """Write the values of a tensor to where they belong, in files that :meth:`begin` made.

        Args:
            folder: of the files.
            name: the tensor.
            blocks: all of it, some rows after the other, on CPU.

        Returns:
            CRC-32 of its bytes. They are read back and are the same.

        Raises:
            CheckpointError: they are not.
        """
        return write_blocks(folder, self.places[name], blocks)


def write_blocks(folder: Path, place: TensorPlace, blocks: Iterable[Block]) -> int:
    """Write all of a tensor, some rows after the other, to its place in a file; they are read back.

    Returns:
        CRC-32 of its bytes.

    Raises:
        CheckpointError: what is read back is something else.
    """
    name, crc32, written = place.spec.name, 0, 0
    with VerifiedFile(folder / place.file, place.offset) as file:
        for block in blocks:
            values = block.values
            if (values.dtype, values.shape[1:]) != (place.spec.dtype, place.spec.shape[1:]):
                raise RuntimeError(f"{name} of {values.dtype} {values.shape} is written for {place.spec}")
            crc32 = combined(crc32, block.checksum(), values.nbytes)
            file.write(bytes_of(values).numpy().data, name)
            written += values.nbytes
    if written != place.spec.nbytes:
        raise RuntimeError(f"{name} was written with {written} bytes for {place.spec}")
    return crc32


class SafetensorsWriter:
    """A folder of safetensors written by one process, tensor after tensor, in any order.

    Args:
        folder: existing folder, written in place.
        specs: every tensor, in the order in which they are to lie (see :class:`SafetensorsFolder`).
        max_shard_size: largest size in bytes of a shard's data; a larger single tensor gets its own shard.
    """

    def __init__(self, folder: Path, specs: list[TensorSpec], max_shard_size: int):
        self.folder = folder
        self._layout = SafetensorsFolder(specs, max_shard_size)
        self._missing = set(self._layout.places)

    def __enter__(self) -> SafetensorsWriter:
        self._layout.begin(self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self._missing:
            raise RuntimeError(f"{len(self._missing)} planned tensors were not written")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one of the planned tensors."""
        self._layout.write(self.folder, name, [Block(tensor)])
        self._missing.remove(name)


def same_bytes(data: Tensor, other: Tensor) -> bool:
    """Whether two [bytes] uint8 are equal; eight bytes are compared at once."""
    if data.shape != other.shape:
        return False
    whole = len(data) // 8 * 8
    if data.data_ptr() % 8 or other.data_ptr() % 8:
        whole = 0
    words = (each[:whole].view(torch.int64) for each in (data, other))
    return torch.equal(*words) and torch.equal(data[whole:], other[whole:])
