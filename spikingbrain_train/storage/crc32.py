"""CRC-32 of two texts after each other, from those of each: tensors are read in parts."""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # of zlib, its bits reversed


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
