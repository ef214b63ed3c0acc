"""Which process a number means, now and later: the system gives the numbers of ended ones anew."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


def start_of(pid: int) -> str:
    """When a process started, in ticks of this boot; empty where the system does not say."""
    fields = _stat(pid)
    return fields[19] if fields else ""


def is_running(pid: int, started: str) -> bool:
    """Whether the process that had this number, and :func:`start_of` at that time, is still there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    fields = _stat(pid)
    return started == (fields[19] if fields else "") and fields[:1] != ["Z"]  # not one that nobody has reaped


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the third one on, which is the state."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


@dataclass(frozen=True)
class ProcessName:
    """What a process can be recognised by, in a file."""

    host: str
    pid: int
    started: str
    """:func:`start_of` it."""

    @classmethod
    def of(cls, pid: int) -> ProcessName:
        """Of a process of this machine that is running."""
        return cls(socket.gethostname(), pid, start_of(pid))

    def is_running_here(self) -> bool:
        """Whether it is a process of this machine and still there."""
        return self.host == socket.gethostname() and is_running(self.pid, self.started)
