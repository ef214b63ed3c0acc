"""Whether the files of a checkpoint are what was saved: after they are written, and before they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from spikingbrain_train.errors import CheckpointError, first_line
from spikingbrain_train.planning.launch import Launch, available_cores
from spikingbrain_train.runtime.checkpoint_metadata import (
    BACKEND,
    BACKEND_FILE,
    COMMON_STATE_FILE,
    WHOLE_FILES,
    read_metadata,
    shard_ranges,
)
from spikingbrain_train.runtime.megatron_versions import COMMON_STATE_IN_FILE
from spikingbrain_train.storage.checkpoint_manifest import Parts, checksums, read_manifest

_MOST_THREADS = 4  # of a rank; storage is not faster with more
_OPTIMIZER = "optimizer."  # how keys of optimizer states begin


def checksums_of_rank(folder: Path) -> dict[str, Parts]:
    """Checksums of the files that this rank has just written; they are read back from the system's memory."""
    rank = torch.distributed.get_rank()
    written = {
        name: checksums(folder / name, parts)
        for name, parts in shard_ranges(read_metadata(folder)).items()
        if name.startswith(f"__{rank}_")
    }
    if rank == 0:
        written |= {name: checksums(folder / name) for name in WHOLE_FILES}
    return written


def reading_threads() -> int:
    """How many parts this rank reads at a time; the ranks of a node share its cores."""
    return min(_MOST_THREADS, max(1, available_cores() // Launch.from_environment().local_world_size))


def check_written(folder: Path) -> None:
    """Hold a checkpoint that all ranks have written against its manifest, as this rank sees the folder.

    Nothing is read but names and sizes: contents were read when the manifest was made.

    Raises:
        CheckpointError: the manifest, or a file of any rank, is missing, shorter or longer than it should be.
    """
    manifest = read_manifest(folder)
    listed = {} if manifest is None else manifest.files
    for name in sorted({*shard_ranges(read_metadata(folder)), *WHOLE_FILES}):
        if name not in listed:
            raise CheckpointError(f"no rank has a checksum of {name}")
        path, parts = folder / name, listed[name].values()
        if not path.is_file():
            raise CheckpointError(f"{name} was written and is missing")
        found, written = path.stat().st_size, sum(length for length, _ in parts)
        if found != written:
            raise CheckpointError(f"{name} has {found} bytes of {written}")


def check_whole_files(folder: Path) -> None:
    """The small files beside the shards, whose damage megatron-core meets with whatever exception it causes.

    Raises:
        CheckpointError: names the file.
    """
    if manifest := read_manifest(folder):
        manifest.check_sizes()
        for name in WHOLE_FILES:
            manifest.check_file(name)
    path = folder / BACKEND_FILE
    try:
        backend = json.loads(path.read_text(encoding="utf-8"))["sharded_backend"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy the checkpoint again") from None
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(f"{path} is damaged; copy the checkpoint again") from None
    if backend != BACKEND:
        raise CheckpointError(f"{path} names the format {backend}; only {BACKEND} checkpoints can be read")
    path = folder / COMMON_STATE_FILE
    if not path.is_file():
        if not COMMON_STATE_IN_FILE:
            return
        raise CheckpointError(f"{path} is missing; copy the checkpoint again")
    try:
        common = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise almost anything
        raise CheckpointError(f"{path} is damaged ({first_line(error)}); copy the checkpoint again") from None
    if not isinstance(common, dict):
        raise CheckpointError(f"{path} does not hold values by name; copy the checkpoint again")


def check_contents(metadata: Metadata, folder: Path, sharded: dict[str, Any]) -> None:
    """Hold what is about to be read against the manifest: each rank a share of it, and all agree.

    Args:
        metadata: of the checkpoint.
        folder: where it lies; without a manifest it is not checked.
        sharded: what will be read; optimizer states are left out where none is asked for.

    Raises:
        CheckpointError: on every rank, naming the file.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    manifest = read_manifest(folder)
    if manifest is None:
        return
    keys = [value.key for value in nested_values(sharded) if isinstance(value, ShardedBase)]
    asks_for_optimizer = any(key.startswith(_OPTIMIZER) for key in keys)
    ranges = shard_ranges(metadata, skip=() if asks_for_optimizer else (_OPTIMIZER,))
    parts = [(name, *part) for name, every in sorted(ranges.items()) for part in sorted(every)]
    share = sum(length for _, _, length in parts) / torch.distributed.get_world_size()
    rank, before, reason = torch.distributed.get_rank(), 0, None
    try:
        own = []
        for name, offset, length in parts:
            if share * rank <= before < share * (rank + 1):  # neighbours in a file are read by one rank
                own.append((name, offset, length))
            before += length
        manifest.check_parts(own, reading_threads())
    except (CheckpointError, OSError) as error:
        reason = str(error)
    reasons: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reasons, reason)
    for said in reasons:
        if said is not None:
            raise CheckpointError(said)
