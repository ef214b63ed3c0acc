"""Copies of a run's state in the memory of its hosts: who keeps them, and whether they fit."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from spikingbrain_train.config.run import MemoryCopies, RunConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.launch import memory_free
from spikingbrain_train.storage.memory_folder import folder_of

_KEPT = 2
"""Steps: while one is written, the one before has to be whole."""


def keeps_copies(config: RunConfig, world_size: int, local_world_size: int) -> bool:
    """Whether each rank's state is kept by another rank, too."""
    wanted = config.checkpoint.memory_copies
    if wanted is MemoryCopies.auto:
        return world_size > local_world_size
    return wanted is MemoryCopies.neighbour and world_size > 1


def is_in_memory(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Whether files of a folder take memory of this host.

    Args:
        folder: any folder.
        mounts: what the system says of its file systems; nothing is known to take memory where it is missing.
    """
    place, found = Path(os.path.realpath(folder)), (Path(), "")
    with suppress(OSError, ValueError):
        for line in mounts.read_text().splitlines():
            _, at, kind, *_ = line.split(" ")
            point = Path(at.replace("\\040", " "))
            if (point == place or point in place.parents) and len(point.parts) >= len(found[0].parts):
                found = point, kind  # of several at one place the last one shows
    return found[1] in ("tmpfs", "ramfs")


def check_room(
    config: RunConfig, of_ranks: float, world_size: int, local_world_size: int, *, beside: float = 0.0
) -> None:
    """Refuse copies that this host has no room for.

    Called before the ranks allocate anything.

    Args:
        config: the run.
        of_ranks: bytes of weights and optimizer state of all ranks on this host.
        world_size: ranks of the run.
        local_world_size: ranks on this host.
        beside: bytes of this host's memory that its ranks take themselves: none to speak of on GPUs.

    Raises:
        ConfigurationError: names the settings, what is needed and what is there.
    """
    if not config.checkpoint.memory_interval:
        return
    folder = Path(config.checkpoint.memory_folder)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigurationError(
            f"checkpoint.memory_folder={folder} is no folder that can be written; name one in memory, or set "
            "checkpoint.memory_interval=0"
        )
    needed = of_ranks * _KEPT * (2 if keeps_copies(config, world_size, local_world_size) else 1)
    left = sum(path.stat().st_size for path in folder_of(str(folder), config.output_dir).rglob("*"))
    room = shutil.disk_usage(folder).free + left
    if needed > room:
        raise ConfigurationError(
            f"checkpoint.memory_interval={config.checkpoint.memory_interval} takes about "
            f"{needed / 2**30:,.1f} GiB of checkpoint.memory_folder={folder}, which has "
            f"{room / 2**30:,.1f} GiB free; set "
            "checkpoint.memory_interval=0, spread the model over more hosts, or give the folder more memory "
            "(docker: --shm-size)"
        )
    free = memory_free()
    if free is not None and is_in_memory(folder) and needed + beside > free + left:
        own = f", and the run {beside / 2**30:,.1f} GiB," if beside else ""
        raise ConfigurationError(
            f"checkpoint.memory_interval={config.checkpoint.memory_interval} takes about "
            f"{needed / 2**30:,.1f} GiB of memory{own} but this machine, or its container or job, has "
            f"{(free + left) / 2**30:,.1f} GiB free; set checkpoint.memory_interval=0, spread the model over "
            "more hosts, or give the job more memory"
        )
