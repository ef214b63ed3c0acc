"""One run at a time in an output_dir. Torch is not needed.

The main process holds a lock on ``<output_dir>/run.lock`` for as long as it lives, and the file says who it
is. The system drops the lock of a killed process, so nothing stale stays behind on its own machine; file
systems that share locks between machines (NFS 4, Lustre mounted with flock, GPFS) show a live run on another
one in the same way. Where locks are not shared, the holder shows that it lives by touching the file every
minute: a free lock whose file names another machine is taken over once nobody has touched it for ten minutes,
as after a container that was killed and is started again under a new name. Within one Slurm job, which runs
once at a time and is requeued under its number, it is taken over at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.storage.file_clock import file_system_time
from spikingbrain_train.storage.processes import is_running, start_of

LOCK_FILE = "run.lock"

TOUCH_SECONDS = 60.0
"""How often a run touches its file."""
STALE_SECONDS = 600.0
"""A file that nobody has touched for so long is of a run that has ended."""

_HELD = (errno.EACCES, errno.EAGAIN)


@dataclass(frozen=True)
class _Holder:
    """What the file says about the run that made it."""

    host: str
    pid: int
    started: str
    """Time of the machine, for people."""
    process_started: str
    """Tells the process from a later one that got its number; empty where the system does not say."""
    slurm_job: str
    """Empty outside of Slurm."""

    @classmethod
    def this_process(cls) -> _Holder:
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=time.strftime("%Y-%m-%d %H:%M:%S"),
            process_started=start_of(os.getpid()),
            slurm_job=os.environ.get("SLURM_JOB_ID", ""),
        )

    @classmethod
    def read(cls, descriptor: int) -> _Holder | None:
        """None where the file is new, or was cut short by a full disk."""
        with contextlib.suppress(ValueError, TypeError):
            return cls(**json.loads(os.pread(descriptor, 1 << 16, 0)))
        return None

    def describe(self) -> str:
        """In words: process, machine and start."""
        job = f", Slurm job {self.slurm_job}" if self.slurm_job else ""
        return f"process {self.pid} on {self.host}, started {self.started}{job}"

    def may_live(self, *, system_locks: bool, silent_seconds: float) -> bool:
        """Whether the run may still be going on although its lock could be taken.

        Args:
            system_locks: whether the file system knows locks.
            silent_seconds: since its file was touched last.
        """
        if self.host != socket.gethostname():
            is_requeued = self.slurm_job != "" and self.slurm_job == os.environ.get("SLURM_JOB_ID")
            return not is_requeued and silent_seconds < STALE_SECONDS
        if system_locks or self.pid == os.getpid():
            return False
        return is_running(self.pid, self.process_started)


def check_not_in_use(output_dir: str | Path) -> None:
    """Say early that another run is in a folder; :func:`run_lock` decides. Changes nothing.

    Raises:
        ConfigurationError: as :func:`run_lock` does.
    """
    path = Path(output_dir) / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # free, or for others to explain
    try:
        system_locks = True
        try:
            # Shared: the ranks that look at the same time do not see each other.
            fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise _in_use(path, _Holder.read(descriptor)) from None
            system_locks = False
        holder = _Holder.read(descriptor)
        _refuse_if_alive(path, descriptor, holder, system_locks=system_locks)
    finally:
        os.close(descriptor)


@contextmanager
def run_lock(output_dir: str | Path) -> Iterator[None]:
    """Hold the lock of a run while the block runs; it makes the folder if there is none.

    Raises:
        ConfigurationError: another run holds it, or may hold it; names its machine, process and start.
        OSError: the folder cannot be made or written.
    """
    folder = Path(output_dir)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    descriptor = _open_and_lock(path)
    me = _Holder.this_process()
    try:
        before = _Holder.read(descriptor)
        if before is not None and before.host != me.host:
            print(
                f"{path} was left by a run on another machine ({before.describe()}); taken over", flush=True
            )
        content = json.dumps(asdict(me)).encode()
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)
        with _touched(descriptor):
            yield
    finally:
        # Removed before the lock is dropped: who takes the next one finds nobody's name in it. Not where
        # another run has taken it over.
        if _Holder.read(descriptor) in (None, me):
            path.unlink(missing_ok=True)
        os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):  # the run has left something there
                folder.rmdir()


@contextmanager
def _touched(descriptor: int) -> Iterator[None]:
    """Touch a file every minute while the block runs."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(TOUCH_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(descriptor)

    thread = threading.Thread(target=touch, name="run lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _refuse_if_alive(path: Path, descriptor: int, holder: _Holder | None, *, system_locks: bool) -> None:
    if holder is None:
        return
    silent_seconds = file_system_time(path.parent) - os.fstat(descriptor).st_mtime
    if holder.may_live(system_locks=system_locks, silent_seconds=silent_seconds):
        raise _in_use(path, holder, wait_seconds=STALE_SECONDS - silent_seconds)


def _open_and_lock(path: Path) -> int:
    """The descriptor that holds the lock: a POSIX one, which forked data workers do not inherit."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            system_locks = True
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _HELD:
                    raise _in_use(path, _Holder.read(descriptor)) from None
                system_locks = False  # a file system without locks
            if not _is_still(path, descriptor):  # its holder has just removed it
                os.close(descriptor)
                continue
            holder = _Holder.read(descriptor)
            _refuse_if_alive(path, descriptor, holder, system_locks=system_locks)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _in_use(path: Path, holder: _Holder | None, wait_seconds: float | None = None) -> ConfigurationError:
    """The refusal; a run whose lock is free is given up after ``wait_seconds`` more of silence."""
    if holder is None:
        return ConfigurationError(
            f"output_dir={path.parent} is in use by another run, which is just starting; choose another "
            "output_dir, or stop that run."
        )
    if holder.host == socket.gethostname():
        return ConfigurationError(
            f"output_dir={path.parent} is in use by another run ({holder.describe()}); choose another "
            "output_dir, or stop that run."
        )
    wait = ""
    if wait_seconds is not None:
        minutes = max(1, math.ceil(wait_seconds / 60))
        wait = (
            f"start again in {minutes} minute(s), when it will count as ended unless it shows that it lives, "
        )
    return ConfigurationError(
        f"output_dir={path.parent} is in use by a run on another machine ({holder.describe()}); {wait}choose "
        f"another output_dir, or, if that run has ended, remove {path}."
    )
