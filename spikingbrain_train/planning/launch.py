"""Who this process is and what its machine gives it. Pure Python: asked before torch is there.

Launchers (torchrun, or scripts/slurm) say who a process is through RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Without them the process is a world of its own: ``python
spikingbrain-train`` needs no launcher.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from spikingbrain_train.config.parallel import AcceleratorKind, ClusterConfig
from spikingbrain_train.errors import PlatformError

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """Who this process is, as its launcher says."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str | None = None
    """Host of the rendezvous store; None for a process that was started without a launcher."""
    master_port: int = 0
    """Its port; 0 without a launcher."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Launch:
        """Read the launcher's variables.

        Raises:
            PlatformError: only some of them are there, one is not a number, or they contradict each other.
        """
        environment = os.environ if environment is None else environment
        if "RANK" not in environment and "WORLD_SIZE" not in environment:
            return cls()
        required = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in required if not environment.get(name)]
        if missing:
            raise PlatformError(
                f"the launcher set only some of {', '.join(required)}; missing: {', '.join(missing)}. Start "
                "with torchrun or a script of scripts/slurm, or unset them all to run one process."
            )
        for name in (*_NUMBERS, "MASTER_PORT"):
            if not environment.get(name, "0").isdecimal():
                raise PlatformError(
                    f"{', '.join(_NUMBERS)} and MASTER_PORT must be numbers, but {name}={environment[name]}; "
                    "start with torchrun or a script of scripts/slurm."
                )
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", rank))
        local_world_size = int(environment.get("LOCAL_WORLD_SIZE", world_size))
        # A rank that its world does not expect would wait for the others until the time-out.
        for name, value, beyond in (
            ("RANK", rank, f"WORLD_SIZE={world_size}"),
            ("LOCAL_RANK", local_rank, f"LOCAL_WORLD_SIZE={local_world_size}"),
        ):
            if value >= int(beyond.partition("=")[2]):
                raise PlatformError(
                    f"the environment says {name}={value} and {beyond}, but ranks count from 0; correct the "
                    "launcher's variables, or start with torchrun or a script of scripts/slurm."
                )
        if local_world_size > world_size:
            raise PlatformError(
                f"the environment says LOCAL_WORLD_SIZE={local_world_size}, more than "
                f"WORLD_SIZE={world_size}; correct the launcher's variables, or start with torchrun."
            )
        port = int(environment["MASTER_PORT"])
        if not 0 < port < 1 << 16:
            raise PlatformError(f"MASTER_PORT={port} is no port; choose one of 1024 to 65535.")
        return cls(rank, world_size, local_rank, local_world_size, environment["MASTER_ADDR"], port)


def available_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process can get: what the machine has, or less in a container or a batch job.

    Args:
        root: where ``proc`` and ``sys`` lie.

    Returns:
        None where the system does not say.
    """
    limits = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                limits.append(int(line.split()[1]) << 10)
    except (OSError, ValueError, IndexError):
        pass
    for file in _control_group_limits(root):
        try:
            limits.append(int(file.read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits, default=None)


def memory_free(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process may still take: what the machine, and every control group, has left.

    Pages of files that can be read again count as free.

    Args:
        root: where ``proc`` and ``sys`` lie.

    Returns:
        None where the system does not say.
    """
    left = []
    with suppress(OSError, ValueError, KeyError):
        left.append(_numbers(root / "proc/meminfo")["MemAvailable:"] << 10)
    for file in _control_group_limits(root):
        is_second_version = file.name == "memory.max"
        used = file.with_name("memory.current" if is_second_version else "memory.usage_in_bytes")
        pages = "inactive_file" if is_second_version else "total_inactive_file"
        with suppress(OSError, ValueError):  # not there, or "max"
            free = int(file.read_text()) - int(used.read_text())
            with suppress(OSError, ValueError, KeyError):
                free += _numbers(file.with_name("memory.stat"))[pages]
            left.append(max(0, free))
    return min(left, default=None)


def _numbers(file: Path) -> dict[str, int]:
    """A number a line, behind its name."""
    return {words[0]: int(words[1]) for line in file.read_text().splitlines() if (words := line.split())}


def _control_group_limits(root: Path) -> list[Path]:
    """Files that may hold a limit of this process's control groups, their parents' limits included."""
    mount = root / "sys/fs/cgroup"
    files = [mount / "memory.max", mount / "memory/memory.limit_in_bytes"]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return files
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base, name = (mount, "memory.max") if not controllers else (mount / "memory", "memory.limit_in_bytes")
        if controllers and "memory" not in controllers.split(","):
            continue
        group = Path(path.lstrip("/"))
        files += [base / folder / name for folder in (group, *group.parents)]
    return files


def has_gpu_device(root: Path = Path("/"), environment: Mapping[str, str] | None = None) -> bool:
    """Whether this process may use a GPU, as far as the system shows.

    It tells by the device file of NVIDIA's driver, MetaX's, or that of WSL, unless CUDA_VISIBLE_DEVICES hides
    them all.

    Args:
        root: where ``dev`` lies.
        environment: variables; None for this process's own.
    """
    visible = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES", "0")
    if visible.strip() == "" or visible.strip().startswith("-1"):
        return False
    return any(any((root / "dev").glob(name)) for name in ("nvidia[0-9]*", "mxcd*", "dxg"))


def expects_gpu(cluster: ClusterConfig) -> bool:
    """Whether the run will be on GPUs, as far as config and machine tell without torch."""
    if cluster.accelerator is AcceleratorKind.auto:
        return has_gpu_device()
    return cluster.accelerator is not AcceleratorKind.cpu
