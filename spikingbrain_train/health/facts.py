"""What a rank sees of its host, and what the run is going to ask of it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spikingbrain_train.config.parallel import AcceleratorKind
from spikingbrain_train.errors import first_line
from spikingbrain_train.health.probe_files import PREFIX, removed_behind
from spikingbrain_train.planning.interfaces import wrong_interface
from spikingbrain_train.planning.launch import Launch, has_gpu_device, memory_limit
from spikingbrain_train.runtime.git_state import git_state

_SEEN_WITHIN = 5.0
"""Seconds until a file of one host has to show on the others; NFS keeps folders in mind for 3 s and more."""
_PACKAGES = ("spikingbrain-train", "torch", "megatron-core", "transformers", "numpy")


@dataclass(frozen=True)
class Need:
    """What the run takes. Rank 0 knows it from the settings, and tells the others."""

    output_dir: str = "."
    """Where checkpoints are going to lie."""
    accelerator: AcceleratorKind = AcceleratorKind.auto
    checkpoint_bytes: int = 0
    """Of one checkpoint; 0 where no settings were given."""
    device_bytes: int = 0
    """Of the fullest rank."""
    token: str = ""
    """Name of a file that rank 0 leaves beside the checkpoints until every host has looked for it."""

    @property
    def on_gpus(self) -> bool:
        """Whether the ranks of this host will compute on GPUs."""
        if self.accelerator is AcceleratorKind.auto:
            return has_gpu_device()
        return self.accelerator is not AcceleratorKind.cpu


@dataclass(frozen=True)
class HostFacts:
    """What all ranks of a node share; bytes and seconds."""

    memory_free: int
    memory_total: int
    disk_free: int
    trouble_with_output: str
    """Why nothing can be written where the checkpoints are going to lie; empty if it can."""
    sees_output_of_rank_0: bool
    versions: Mapping[str, str]
    """Package, ``python`` and ``commit`` -> version."""
    trouble_with_network: str = ""
    """A variable that names an interface which is not there, in a sentence; empty if none does."""


@dataclass(frozen=True)
class RankFacts:
    """What one rank sees."""

    rank: int
    node: int
    """Counted from 0, in the order of ranks."""
    host: str
    device: str = "cpu"
    """Name of its GPU; empty where it needs one and has none that can be used."""
    gpus_seen: int = 0
    device_free: int = 0
    device_total: int = 0
    trouble_with_device: str = ""
    """Why the GPU that it has cannot be used; empty if it can."""
    on_host: HostFacts | None = None
    """Of the first rank of a node; None of the others."""
    clock_seconds: float = 0.0
    """The node's clock less that of rank 0."""


def host_name() -> str:
    """As Slurm calls this node, else as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def rank_facts(launch: Launch, need: Need) -> RankFacts:
    """Look at this rank's GPU, and on the first rank of a node at the node."""
    import torch

    facts = {
        "rank": launch.rank,
        "node": launch.rank // launch.local_world_size,
        "host": host_name(),
        "on_host": _host_facts(need) if launch.local_rank == 0 else None,
    }
    if not need.on_gpus:
        return RankFacts(**facts)  # type: ignore[arg-type]
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if launch.local_rank >= seen:
        return RankFacts(**facts, device="", gpus_seen=seen)  # type: ignore[arg-type]
    try:
        free, total = torch.cuda.mem_get_info(launch.local_rank)
        name = torch.cuda.get_device_name(launch.local_rank)
    except RuntimeError as error:  # it is broken, another process's alone, or has no room for a context
        trouble = first_line(error)
        return RankFacts(**facts, device="", gpus_seen=seen, trouble_with_device=trouble)  # type: ignore[arg-type]
    return RankFacts(**facts, device=name, gpus_seen=seen, device_free=free, device_total=total)  # type: ignore[arg-type]


def _host_facts(need: Need) -> HostFacts:
    import psutil

    memory = psutil.virtual_memory()
    limit = memory_limit() or memory.total
    folder = nearest_folder(need.output_dir)
    return HostFacts(
        memory_free=min(memory.available, limit),
        memory_total=min(memory.total, limit),
        disk_free=shutil.disk_usage(folder).free,
        trouble_with_output=trouble_with(folder),
        sees_output_of_rank_0=_sees(folder, need.token),
        versions=versions(),
        trouble_with_network=wrong_interface(need.on_gpus, host_name()),
    )


def nearest_folder(output_dir: str) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    nearest = Path(os.path.abspath(output_dir))
    while not os.path.isdir(nearest):  # Path.is_dir raises where a folder on the way is closed
        nearest = nearest.parent
    return nearest


def trouble_with(folder: Path) -> str:
    """Why no file can be written there; empty if one can."""
    probe = folder / f"{PREFIX}{host_name()}-{os.getpid()}"
    with removed_behind(probe):
        try:
            probe.write_bytes(b"\0" * 4096)
        except OSError as error:
            return error.strerror or str(error)
    return ""


def _sees(folder: Path, token: str) -> bool:
    """Whether the file of rank 0 is there, or comes within some seconds."""
    deadline = time.monotonic() + _SEEN_WITHIN
    while token and not _holds(folder, token):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _holds(folder: Path, name: str) -> bool:
    try:
        return name in os.listdir(
            folder
        )  # asks the server, where a look for the file may be answered from memory
    except OSError:  # files can be put there and not listed
        return os.path.exists(folder / name)


def versions() -> dict[str, str]:
    """Of Python, of what computes, and of this code."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    code = git_state()
    if code is not None:
        changed = f" with {len(code.changed_files)} changed files" if code.changed_files else ""
        found["commit"] = f"{code.commit[:12]}{changed}"
    return found
