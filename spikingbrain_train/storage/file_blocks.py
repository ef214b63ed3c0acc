"""Large files in blocks: what is written is read back and compared at once, and sent to the disk early.

Who goes through gigabytes once needs no more memory for a large tensor than for a small one, and the system
need not keep what has passed: new pages for it cost more than the copying itself on some virtual machines,
and other programs' files would have to give way. Torch is not needed.
"""

from __future__ import annotations

import os
from io import FileIO, RawIOBase
from pathlib import Path
from typing import Any

from spikingbrain_train.errors import CheckpointError

BLOCK_BYTES = 8 << 20
_WINDOW_BYTES = 64 << 20
"""A disk that is told to write so much at once is kept busy."""


def read_exactly(file: FileIO, view: memoryview) -> None:
    """Fill ``view`` from where ``file`` is.

    Raises:
        EOFError: it ends before.
    """
    while view:
        number = file.readinto(view)
        if not number:
            raise EOFError(f"the file ends {len(view)} bytes early")
        view = view[number:]


def forget(file: FileIO, offset: int, length: int) -> None:
    """Let the system drop a range of a file from memory, where it can, and begin to write what is not yet."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)


def sync_and_forget(path: Path) -> None:
    """Wait until the content of a file is on the disk, and let the system drop it from memory."""
    with FileIO(path) as file:
        os.fsync(file.fileno())
        forget(file, 0, 0)


def write_all(file: FileIO, view: memoryview) -> None:
    """Write all of ``view`` to where ``file`` is. Raises OSError."""
    while view:
        view = view[file.write(view) :]


class FilePart(RawIOBase):
    """Some bytes of a file, read as if they were a file of their own.

    Args:
        path: the file.
        offset: where the part begins.
        length: its bytes.
    """

    def __init__(self, path: Path, offset: int, length: int) -> None:
        super().__init__()
        self._file = FileIO(path)
        self._offset, self._length = offset, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._offset + self._at)
        number = self._file.readinto(view) if view else 0
        self._at += number
        return number

    def close(self) -> None:
        self._file.close()
        super().close()


class VerifiedFile:
    """Writes to a file what it then holds: every block is read back.

    Args:
        path: an existing file, or the name of one to make.
        at: first byte to write; None appends.
    """

    def __init__(self, path: Path, at: int | None = None) -> None:
        self.path = path
        # Unbuffered, and open for reading too.
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self.position = self._file.seek(0, os.SEEK_END) if at is None else at
        """Byte that is written next."""
        self._begin = self._told = self.position
        self._back = bytearray()

    def __enter__(self) -> VerifiedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: memoryview | bytes, name: str) -> None:
        """Write bytes.

        Args:
            data: bytes, contiguous.
            name: what they are, for the sentence of an error.

        Raises:
            CheckpointError: other bytes are read back.
            OSError: the disk is full or fails.
        """
        view = memoryview(data)
        while view:
            block, view = view[:BLOCK_BYTES], view[BLOCK_BYTES:]
            self._file.seek(self.position)
            write_all(self._file, block)
            if not self._comes_back(block):
                raise CheckpointError(
                    f"{self.path}: {name} was written, but other bytes are read back; check the memory and "
                    "the disk of this machine and run the command again"
                )
            self.position += len(block)
            if self.position - self._told >= _WINDOW_BYTES:
                self._send()

    def _comes_back(self, block: memoryview) -> bool:
        if len(self._back) != len(block):
            self._back = bytearray(len(block))
        self._file.seek(self.position)
        try:
            read_exactly(self._file, memoryview(self._back))
        except EOFError:
            return False
        return self._back == block  # a bytearray compares memory; a memoryview, item by item

    def _send(self) -> None:
        """Have the disk begin, so that whoever waits for it later waits less; drop what was sent before."""
        forget(self._file, self._told, self.position - self._told)
        if self._told > self._begin:
            forget(self._file, self._begin, self._told - self._begin)
        self._told = self.position
