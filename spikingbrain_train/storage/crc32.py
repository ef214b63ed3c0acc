"""CRC-32 as zlib computes it, at the speed of memory, of files, and of two texts after each other.

zlib itself takes several times as long for it as the system for reading a file that it has in memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from functools import lru_cache
from io import FileIO
from pathlib import Path

from isal import isal_zlib

_POLYNOMIAL = 0xEDB88320  # of zlib, its bits reversed

_BLOCK_BYTES = 512 * 1024  # what the cache of a core holds between reading and computing
_WINDOW_BYTES = 8 * 1024 * 1024  # of what is mapped at a time
_MADV_POPULATE_READ = 22  # Linux 5.14; Python 3.11 has no name for it, and its own madvise keeps the GIL
_LIBC = ctypes.CDLL(None)


def crc32_of_part(path: Path, offset: int, length: int) -> int | None:
    """CRC-32 of some bytes of a file, None where it ends before. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        if offset + length > os.fstat(file.fileno()).st_size:
            return None
        value, done = 0, 0
        while length - done >= _BLOCK_BYTES:
            number = min(length - done, _WINDOW_BYTES)
            mapped = _crc32_mapped(file, offset + done, number, value)
            if mapped is None:
                break
            value, done = mapped, done + number
        return _crc32_read(file, offset + done, length - done, value)


def _crc32_mapped(file: FileIO, offset: int, length: int, value: int) -> int | None:
    """What follows ``value``, from the system's own copy of a file: one pass over memory instead of two.

    None where the system does not say before whether it can read all of it: a process that looked there would
    be killed.
    """
    before = offset % mmap.ALLOCATIONGRANULARITY
    try:
        # A private copy of which nothing is written, as ctypes gives no address of what is read-only.
        pages = mmap.mmap(file.fileno(), before + length, access=mmap.ACCESS_COPY, offset=offset - before)
    except (OSError, ValueError):  # a file system that maps nothing; a file that has been cut since
        return None
    with pages:
        begin = ctypes.c_char.from_buffer(pages)
        is_there = _LIBC.madvise(ctypes.byref(begin), ctypes.c_size_t(len(pages)), _MADV_POPULATE_READ) == 0
        del begin  # or the pages could not be given back
        if not is_there:
            return None
        with memoryview(pages) as view, view[before:] as part:
            return isal_zlib.crc32(part, value)


def _crc32_read(file: FileIO, offset: int, length: int, value: int) -> int | None:
    block = memoryview(bytearray(min(length, _BLOCK_BYTES)))
    file.seek(offset)
    while length > 0 and (number := file.readinto(block[:length])):
        value = isal_zlib.crc32(block[:number], value)
        length -= number
    return value if length == 0 else None


def combined(first: int, second: int, second_bytes: int) -> int:
    """CRC-32 of a text followed by another, as zlib's ``crc32_combine`` computes it.

    Args:
        first: CRC-32 of the first text; 0 where it is empty.
        second: CRC-32 of the second.
        second_bytes: length of the second.
    """
    if second_bytes == 0:
        return first
    return _times(_of_zeros(second_bytes), first) ^ second


@lru_cache(maxsize=64)  # tensors come in few sizes
def _of_zeros(number: int) -> list[int]:
    """What so many zero bytes that follow do to a checksum, as columns over GF(2)."""
    operator = [_POLYNOMIAL, *(1 << bit for bit in range(31))]  # of one zero bit; squared thrice: of a byte
    for _ in range(3):
        operator = _squared(operator)
    total = [1 << bit for bit in range(32)]
    while number:
        if number & 1:
            total = [_times(operator, column) for column in total]
        operator = _squared(operator)
        number >>= 1
    return total


def _times(matrix: list[int], vector: int) -> int:
    total = 0
    for column in matrix:
        if vector & 1:
            total ^= column
        vector >>= 1
    return total


def _squared(matrix: list[int]) -> list[int]:
    return [_times(matrix, column) for column in matrix]
