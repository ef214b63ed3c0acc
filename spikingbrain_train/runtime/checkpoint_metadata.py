"""``.metadata`` of torch.distributed.checkpoint: a pickle, read without trusting whoever wrote it."""

from __future__ import annotations

import enum
import pickle
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spikingbrain_train.errors import CheckpointError

if TYPE_CHECKING:  # it takes a second to import: not before a checkpoint is read
    from torch.distributed.checkpoint.metadata import Metadata

METADATA_FILE = ".metadata"
COMMON_STATE_FILE = "common.pt"
BACKEND_FILE = "metadata.json"
WHOLE_FILES = (METADATA_FILE, COMMON_STATE_FILE, BACKEND_FILE)
"""The small files of a checkpoint, which are read at once."""

BACKEND = "torch_dist"
"""megatron-core's name of the one format of shards that is written and read here, in ``metadata.json``."""
ONE_KEY_PER_LAYER: Mapping[str, bool] = {"non_homogeneous_layers": True}
"""How a model must build its sharded state dict to have the keys of our checkpoints."""

_DCP = "torch.distributed.checkpoint."
_PERMITTED = {
    "metadata": (
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    ),
    "filesystem": ("_StorageInfo", "_StoragePrefix"),
    "planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
}
"""Module of torch.distributed.checkpoint -> its classes of which ``.metadata`` may consist."""


@cache
def _permitted_globals() -> dict[tuple[str, str], Any]:
    return {
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
        **{
            (_DCP + module, name): getattr(import_module(_DCP + module), name)
            for module, names in _PERMITTED.items()
            for name in names
        },
    }


def _member(kind: Any, name: Any) -> enum.Enum:
    """A member by its name, which is how Python before 3.11.4 pickles one: ``getattr(kind, name)``."""
    if isinstance(kind, enum.EnumMeta) and name in kind.__members__:
        member: enum.Enum = kind[name]
        return member
    raise pickle.UnpicklingError(f"it takes {name!r} of something that is no enumeration with such a member")


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles the classes of which ``.metadata`` consists and nothing else: no code of the file runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (permitted := _permitted_globals()):
            return permitted[(module, name)]
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def read_metadata(folder: Path) -> Metadata:
    """``.metadata`` of a checkpoint folder, unpickled without running anything that the file asks for.

    Raises:
        CheckpointError: the file is missing, damaged or refers to anything but checkpoint metadata.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    path = folder / METADATA_FILE
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {folder} is not a complete Megatron checkpoint") from None
    except Exception as error:  # a damaged pickle can raise almost anything
        raise CheckpointError(
            f"{path} is damaged or not checkpoint metadata ({error}); copy the folder again"
        ) from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path} does not hold checkpoint metadata; copy the folder again")
    return metadata


def check_shards_are_whole(metadata: Metadata, folder: Path) -> None:
    """Compare the files of a checkpoint with what its ``.metadata`` says they hold.

    An interrupted copy is found at once, even where the part that a run would read has arrived.

    Raises:
        CheckpointError: a file is missing, too short or outside of the folder.
    """
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        name = str(info.relative_path)
        ends[name] = max(ends.get(name, 0), int(info.offset) + int(info.length))
    for name, end in sorted(ends.items()):
        if Path(name).name != name:
            raise CheckpointError(f"{folder}: {METADATA_FILE} points outside of the folder, at {name}")
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; copy the checkpoint again")
        if path.stat().st_size < end:
            raise CheckpointError(
                f"{path} is damaged: it has {path.stat().st_size} bytes of {end}; copy the checkpoint again"
            )


def shard_ranges(metadata: Metadata, skip: tuple[str, ...] = ()) -> dict[str, list[tuple[int, int]]]:
    """File name -> (offset, bytes) of every chunk that it holds.

    Args:
        metadata: of the checkpoint.
        skip: beginnings of keys whose chunks are left out.
    """
    ranges: dict[str, list[tuple[int, int]]] = {}
    for index, info in metadata.storage_data.items():
        if not index.fqn.startswith(skip):
            ranges.setdefault(str(info.relative_path), []).append((int(info.offset), int(info.length)))
    return ranges
