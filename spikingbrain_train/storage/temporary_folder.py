"""Temporary folders beside what they become. A later call removes those whose makers were killed.

A folder ``NAME.tmp-<process id>`` belongs to the process that holds the lock on its file ``.owner``. The
system lets go of a lock with its process, however that ends, so a folder without one is abandoned.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

_OWNER = ".owner"
REPLACED = "old"
"""Name within a temporary folder of what lay at the target, while the new takes its place."""
_QUIET_SECONDS = 3600.0
"""Not every file system shares locks between machines. A folder of another one is abandoned if, besides,
nothing in it has changed for this long."""


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target``, which is removed in the end; abandoned ones are removed first.

    Args:
        target: its parent exists; ``<target>.tmp-<process id>`` is made.

    Raises:
        OSError: the folder cannot be made.
    """
    remove_abandoned(target)
    folder = _make(target)
    try:
        with (folder / f"{_OWNER}.new").open("w", encoding="utf-8") as owner:
            _lock(owner.fileno())
            json.dump({"host": socket.gethostname(), "pid": os.getpid()}, owner)
            owner.flush()
            # Under its name it is locked already: nobody ever sees a living owner's file without a lock.
            os.replace(folder / f"{_OWNER}.new", folder / _OWNER)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(target: Path) -> None:
    """Remove temporary folders beside ``target`` whose makers are gone, and say so in the log.

    What a maker that was killed in the middle of the exchange had moved aside goes back to ``target``.
    """
    pattern = re.compile(re.escape(target.name) + r"\.tmp-(\d+)(-\d+)?")
    try:
        beside = sorted(target.parent.iterdir())
    except OSError:
        return
    for folder in beside:
        match = pattern.fullmatch(folder.name)
        if match is None or folder.is_symlink() or not folder.is_dir():
            continue
        if not _is_abandoned(folder, int(match[1])):
            continue
        if (folder / REPLACED).is_dir() and not os.path.lexists(target):
            os.rename(folder / REPLACED, target)
            logger.warning("%s is put back, where a killed call had moved it aside", target)
        shutil.rmtree(folder, ignore_errors=True)
        logger.warning("%s, which a killed call had left, is removed", folder)


def _make(target: Path) -> Path:
    """Process ids repeat between containers that share a disk."""
    for attempt in range(100):
        folder = target.with_name(f"{target.name}.tmp-{os.getpid()}" + (f"-{attempt}" if attempt else ""))
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise FileExistsError(f"{folder} and others of that name exist")


def _lock(descriptor: int) -> bool | None:
    """Take the lock if nobody has it. None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _is_abandoned(folder: Path, pid: int) -> bool:
    try:
        with (folder / _OWNER).open("r+", encoding="utf-8") as owner:
            got_lock = _lock(owner.fileno())
            host = json.load(owner).get("host")
    except FileNotFoundError:  # killed before it could say so, or made by an earlier release
        return pid == os.getpid() or not _is_running(pid)
    except (OSError, ValueError, AttributeError):
        return False
    if got_lock is False:
        return False
    if host == socket.gethostname():
        return got_lock is True or not _is_running(pid)
    return time.time() - _last_change(folder) > _QUIET_SECONDS


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _last_change(folder: Path) -> float:
    times = [folder.stat().st_mtime]
    for path in folder.rglob("*"):
        try:
            times.append(path.lstat().st_mtime)
        except OSError:
            continue
    return max(times)
