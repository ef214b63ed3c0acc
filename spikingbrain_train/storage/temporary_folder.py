"""Temporary folders beside what they become. A later call removes those whose makers were killed, or goes on.

A folder ``NAME.tmp-<process id>`` belongs to the process that holds the lock on its file ``.owner``. The
system lets go of a lock with its process, however that ends, so a folder without one is abandoned. Processes
that help the owner share the lock on ``.helpers``: they may outlive it by a moment, which is waited for.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from spikingbrain_train.storage.file_clock import file_system_time

logger = logging.getLogger(__name__)

_OWNER = ".owner"
_HELPERS = ".helpers"
_HELPERS_SECONDS = 60.0
"""Helpers of a killed owner end at once; one that does not is in a call to a disk that does not answer."""
REPLACED = "old"
"""Name within a temporary folder of what lay at the target, while the new takes its place."""
_QUIET_SECONDS = 3600.0
"""Not every file system shares locks between machines. A folder of another one is abandoned if, besides,
nothing in it has changed for this long."""


@contextmanager
def temporary_folder(
    target: Path,
    *,
    goes_on: Callable[[Path], bool] | None = None,
    keeps: Callable[[BaseException], bool] | None = None,
) -> Iterator[Path]:
    """Yield a folder beside ``target``, which is removed in the end; abandoned ones are removed first.

    Args:
        target: its parent exists; ``<target>.tmp-<process id>`` is made.
        goes_on: whether an abandoned folder is one to go on in: it is taken over with all that it holds,
            instead of an empty one. None takes none.
        keeps: whether the folder stays, for a later call to go on in, when this is raised. None keeps none.

    Raises:
        OSError: the folder cannot be made.
    """
    with ExitStack() as stack:
        folder = None
        if goes_on is not None:
            folder = _take_over(target, goes_on, stack)
        remove_abandoned(target)
        if folder is None:
            folder = _make(target)
        is_kept = False
        try:
            owner = stack.enter_context((folder / f"{_OWNER}.new").open("w", encoding="utf-8"))
            _lock(owner.fileno())
            json.dump({"host": socket.gethostname(), "pid": os.getpid()}, owner)
            owner.flush()
            # Under its name it is locked already: nobody ever sees a living owner's file without a lock.
            os.replace(folder / f"{_OWNER}.new", folder / _OWNER)
            yield folder
        except BaseException as error:
            is_kept = keeps is not None and keeps(error)
            raise
        finally:
            if not is_kept:
                shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(target: Path, *, but: Callable[[Path], bool] | None = None) -> None:
    """Remove temporary folders beside ``target`` whose makers are gone, and say so in the log.

    What a maker that was killed in the middle of the exchange had moved aside goes back to ``target``.

    Args:
        target: what the folders were to become.
        but: which of them stay.
    """
    for folder in abandoned_folders(target):
        if (folder / REPLACED).is_dir() and not os.path.lexists(target):
            os.rename(folder / REPLACED, target)
            logger.warning("%s is put back, where a killed call had moved it aside", target)
        if but is not None and but(folder):
            continue
        shutil.rmtree(folder, ignore_errors=True)
        logger.warning("%s, which a killed call had left, is removed", folder)


def abandoned_folders(target: Path) -> Iterator[Path]:
    """Temporary folders beside ``target`` whose makers, and those who helped them, are gone."""
    for folder, pid in _temporary_folders(target):
        if _is_abandoned(folder, pid) and _helpers_are_gone(folder):
            yield folder


def maker_of(target: Path) -> str | None:
    """Who is certainly making ``target`` now, in words; None where nobody is, or the disk has no locks."""
    for folder, pid in _temporary_folders(target):
        try:
            with (folder / _OWNER).open("r+", encoding="utf-8") as owner:
                if _lock(owner.fileno()) is False:
                    host = json.load(owner).get("host")
                    return f"process {pid} on {host}"
        except (OSError, ValueError, AttributeError):
            continue
    return None


def _temporary_folders(target: Path) -> Iterator[tuple[Path, int]]:
    """Those beside ``target``, whoever made them, with the process that their names tell."""
    pattern = re.compile(re.escape(target.name) + r"\.tmp-(\d+)(-\d+)?")
    try:
        beside = sorted(target.parent.iterdir())
    except OSError:
        return
    for folder in beside:
        match = pattern.fullmatch(folder.name)
        if match is not None and not folder.is_symlink() and folder.is_dir():
            yield folder, int(match[1])


@contextmanager
def helping(folder: Path) -> Iterator[None]:
    """While the body runs, ``folder`` of another process is not abandoned, even if that one is killed."""
    with (folder / _HELPERS).open("a", encoding="utf-8") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file.fileno(), fcntl.LOCK_SH)
        yield


def _take_over(target: Path, goes_on: Callable[[Path], bool], stack: ExitStack) -> Path | None:
    """The first abandoned folder to go on in, under this process's name, its lock held by ``stack``."""
    for folder in abandoned_folders(target):
        if not goes_on(folder):
            continue
        try:
            owner: TextIO = (folder / _OWNER).open("r+", encoding="utf-8")
        except OSError:
            continue
        if _lock(owner.fileno()) is False:  # somebody else has just taken it over
            owner.close()
            continue
        stack.enter_context(owner)
        if (folder / REPLACED).is_dir() and not os.path.lexists(target):
            os.rename(folder / REPLACED, target)
        own = _make(target)
        os.rename(folder, own)  # onto the empty folder of that name
        return own
    return None


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
    return file_system_time(folder.parent) - _last_change(folder) > _QUIET_SECONDS


def _helpers_are_gone(folder: Path) -> bool:
    """Wait until nobody holds the lock of :func:`helping`; False where somebody does not let go of it."""
    try:
        with (folder / _HELPERS).open("r+", encoding="utf-8") as file:
            until = time.monotonic() + _HELPERS_SECONDS
            while _lock(file.fileno()) is False:
                if time.monotonic() > until:
                    return False
                time.sleep(0.02)
    except OSError:
        return not folder.joinpath(_HELPERS).exists()
    return True


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
