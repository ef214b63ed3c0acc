"""Files and folders that a power loss leaves in their old or their new state, never in between.

A rename is safe when what it makes visible has reached the disk before, and the folder that holds the name
after. Reads and writes plain files: torch is not needed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # what file systems say that sync no folders


def sync_file(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system can do that."""
    try:
        sync_file(path)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def sync_tree(root: Path) -> None:
    """Wait until a folder with all that is in it is on the disk."""
    for folder, _, names in os.walk(root):
        for name in names:
            if not (path := Path(folder) / name).is_symlink():
                sync_file(path)
        sync_folder(Path(folder))


def rename_durably(complete: Path, final: Path) -> None:
    """Give a file or folder, complete and synced, its final name in a folder of the same file system.

    Only a file may be there, which is replaced.
    """
    os.replace(complete, final)
    sync_folder(final.parent)


@contextmanager
def replaced_durably(path: Path) -> Iterator[Path]:
    """The name of a temporary file beside ``path``, which the body writes and which then takes its place.

    Where the body raises, nothing of it is left and ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        sync_file(temporary)
        rename_durably(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_durably(path: Path, text: str) -> None:
    """Replace a small text file by ``text``."""
    with replaced_durably(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line_durably(path: Path, line: str) -> None:
    """Add a line to a file, or make the file, in one write: it is there as a whole or not at all.

    Half a line that a full disk left before it is ended first.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        is_ended = size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"
        data = (line if is_ended else f"\n{line}").encode() + b"\n"
        if os.write(descriptor, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
