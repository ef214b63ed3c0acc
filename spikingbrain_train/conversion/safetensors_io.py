"""Safetensors folders, one tensor at a time: :class:`SafetensorsReader` and :class:`SafetensorsWriter`.

Neither ever holds more than the tensor at hand, so memory does not grow with the checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spikingbrain_train.conversion.hf_folder import INDEX_FILE, SINGLE_FILE, read_weight_map
from spikingbrain_train.errors import CheckpointError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}

_QUANTISER_SCALES = ".weight_quantizer.scales"  # how the published W8ASpike class names them


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

    def __init__(self, folder: Path):
        self.folder = folder
        self.specs: dict[str, TensorSpec] = {}
        self._files: dict[str, Path] = {}
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

    def file_of(self, name: str) -> Path:
        """The file that holds tensor ``name``."""
        return self._files[name]

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` on CPU, in its stored shape and dtype."""
        path = self._files[name]
        try:
            # Opened anew for each tensor: closing lets go of the pages that the mapping pulled into memory.
            with safe_open(path, framework="pt", device="cpu") as file:
                return file.get_tensor(name)
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
                    if code not in DTYPES:
                        raise CheckpointError(
                            f"{path}: {name} has dtype {code}; supported are {', '.join(DTYPES)}: import the "
                            "unquantised checkpoint"
                        )
                    self._files[name] = path
                    self.specs[name] = TensorSpec(name, shape, DTYPES[code])
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; copy the whole folder from its source") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is not a complete safetensors file ({error}); copy it again from its source"
            ) from None


def refuse_quantised(reader: SafetensorsReader) -> None:
    """Refuse a published W8ASpike folder, which config.json does not tell from the plain SpikingBrain-7B.

    Its weights are ordinary floats; what they are rounded to is stored beside them.

    Raises:
        CheckpointError: there are scales of a weight quantiser.
    """
    scales = sorted(name for name in reader.specs if name.endswith(_QUANTISER_SCALES))
    if scales:
        raise CheckpointError(
            f"{reader.folder} is a quantised W8ASpike checkpoint: {len(scales)} tensors such as {scales[0]} "
            "hold the scales of its weights; use the unquantised SpikingBrain-7B checkpoint"
        )


class SafetensorsWriter:
    """Writes tensors into ``model.safetensors``, or into shards with an index above ``max_shard_size``.

    The header of a shard comes before its data, so shapes and dtypes of all tensors are given first and the
    values follow through :meth:`write` in the same order. Order tensors by falling dtype size: the format
    aligns none, and readers expect each to start at a multiple of its element size.

    Args:
        folder: existing folder, written in place.
        specs: every tensor, in writing order.
        max_shard_size: largest size in bytes of a shard's data; a larger single tensor gets its own shard.
    """

    def __init__(self, folder: Path, specs: list[TensorSpec], max_shard_size: int):
        self.folder = folder
        self._shards: list[list[TensorSpec]] = []
        size = 0
        for spec in specs:
            if not self._shards or size + spec.nbytes > max_shard_size:
                self._shards.append([])
                size = 0
            self._shards[-1].append(spec)
            size += spec.nbytes
        self._queue = [(number, spec) for number, shard in enumerate(self._shards) for spec in shard]
        self._position = 0
        self._current = -1
        self._file: BinaryIO | None = None

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is not None:
            return
        if self._position != len(self._queue):
            raise RuntimeError(f"{len(self._queue) - self._position} planned tensors were not written")
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": sum(spec.nbytes for _, spec in self._queue)},
                "weight_map": {spec.name: self._file_name(number) for number, spec in self._queue},
            }
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor of the plan."""
        number, spec = self._queue[self._position]
        if (name, tuple(tensor.shape), tensor.dtype) != (spec.name, spec.shape, spec.dtype):
            raise RuntimeError(
                f"{name} {tuple(tensor.shape)} {tensor.dtype} was written where {spec} was planned"
            )
        if number != self._current:
            self._open_shard(number)
        assert self._file is not None
        self._file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._position += 1

    def _file_name(self, number: int) -> str:
        total = len(self._shards)
        return SINGLE_FILE if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"

    def _open_shard(self, number: int) -> None:
        if self._file is not None:
            self._file.close()
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in self._shards[number]:
            header[spec.name] = {
                "dtype": DTYPE_CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # data starts at a multiple of 8 bytes
        self._file = (self.folder / self._file_name(number)).open("wb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        self._current = number
