"""One run at a time in an output_dir. Torch is not needed.

The main process holds a lock on ``<output_dir>/run.lock`` for as long as it lives, and the file says who it
is. The system drops the lock of a killed process, so nothing stale stays behind on its own machine; file
systems that share locks between machines (NFS 4, Lustre mounted with flock, GPFS) show a live run on another
one in the same way. Where the lock is free but the file names another machine, nobody can tell whether its
run still lives: that is refused, except within one Slurm job, which runs once at a time and is requeued under
its number.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from spikingbrain_train.config.errors import ConfigurationError

LOCK_FILE = "run.lock"

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
            process_started=_start_of(os.getpid()),
            slurm_job=os.environ.get("SLURM_JOB_ID", ""),
        )

    @classmethod
    def read(cls, descriptor: int) -> _Holder | None:
        """None where the file is new, or was cut short by a full disk."""
        with contextlib.suppress(ValueError, TypeError):
            return cls(**json.loads(os.pread(descriptor, 1 << 16, 0)))
        return None

    def may_live(self, *, system_locks: bool) -> bool:
        """Whether the run may still be going on although its lock could be taken."""
        if self.host != socket.gethostname():
            return not self.slurm_job or self.slurm_job != os.environ.get("SLURM_JOB_ID")
        if system_locks or self.pid == os.getpid():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return self.process_started == _start_of(self.pid)


def _start_of(pid: int) -> str:
    """When a process started, in ticks of this boot; empty where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


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
        if holder is not None and holder.may_live(system_locks=system_locks):
            raise _in_use(path, holder)
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
    try:
        content = json.dumps(asdict(_Holder.this_process())).encode()
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)
        yield
    finally:
        # Removed before the lock is dropped: who takes the next one finds nobody's name in it.
        path.unlink(missing_ok=True)
        os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):  # the run has left something there
                folder.rmdir()


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
            if holder is not None and holder.may_live(system_locks=system_locks):
                raise _in_use(path, holder)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _in_use(path: Path, holder: _Holder | None) -> ConfigurationError:
    if holder is None:
        return ConfigurationError(
            f"output_dir={path.parent} is in use by another run, which is just starting; choose another "
            "output_dir, or stop that run."
        )
    who = f"process {holder.pid} on {holder.host}, started {holder.started}"
    if holder.slurm_job:
        who += f", Slurm job {holder.slurm_job}"
    if holder.host == socket.gethostname():
        return ConfigurationError(
            f"output_dir={path.parent} is in use by another run ({who}); choose another output_dir, or stop "
            "that run."
        )
    return ConfigurationError(
        f"output_dir={path.parent} is in use by a run on another machine ({who}); choose another output_dir, "
        f"or, if that run has ended, remove {path}."
    )
