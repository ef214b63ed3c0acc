"""What one rank keeps in memory of a step, as files: tensors (safetensors), the rest, checksums of both."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spikingbrain_train.errors import CheckpointError, first_line
from spikingbrain_train.storage.checkpoint_manifest import checksums, read_manifest, write_manifest

TENSOR_FILE = "state.safetensors"
PLAIN_FILE = "state.pt"

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that the file of some tensors takes."""
    return 8 + len(_header(tensors)) + sum(tensor.nbytes for tensor in tensors.values())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors from wherever they lie into a file in memory, whose pages are used again where it exists.

    New pages cost several times what copying into old ones does.

    Raises:
        OSError: there is no room.
    """
    header, size = _header(tensors), tensor_bytes(tensors)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(descriptor, size)
        os.posix_fallocate(descriptor, 0, size)  # without room: an error here, not a signal while copying
        with mmap.mmap(descriptor, size) as file:
            file[:8] = len(header).to_bytes(8, "little")
            file[8 : 8 + len(header)] = header
            at = 8 + len(header)
            for tensor in tensors.values():
                if tensor.nbytes:
                    _copy(tensor, file, at)
                at += tensor.nbytes
    finally:
        os.close(descriptor)


def _copy(tensor: Tensor, file: mmap.mmap, at: int) -> None:
    place = torch.frombuffer(file, dtype=torch.uint8, count=tensor.nbytes, offset=at)
    place.copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """Of a safetensors file, which places the tensors one behind the other."""
    entries, at = {}, 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


def seal(folder: Path) -> None:
    """Write the checksums of all that lies in a folder; it is complete then."""
    write_manifest(folder, {TENSOR_FILE: checksums(folder / TENSOR_FILE)})


def check(folder: Path) -> None:
    """Hold a shard to its checksums.

    Raises:
        CheckpointError: it is not what was kept.
        OSError: it cannot be read.
    """
    manifest = read_manifest(folder)
    if manifest is None or TENSOR_FILE not in manifest.files or PLAIN_FILE not in manifest.beside:
        raise CheckpointError(f"{folder} is not complete")
    manifest.check_sizes()
    manifest.check_beside()
    manifest.check_file(TENSOR_FILE)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a shard that was checked, as the file is mapped: nothing is copied.

    Raises:
        CheckpointError: it is not what :func:`write_tensors` has written.
        OSError: it cannot be read.
    """
    try:
        return load_file(folder / TENSOR_FILE)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / TENSOR_FILE} holds no tensors ({first_line(error)})") from error
