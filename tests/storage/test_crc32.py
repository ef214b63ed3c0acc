"""Checksums of parts give that of the whole, and are zlib's."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest

from spikingbrain_train.storage import crc32
from spikingbrain_train.storage.crc32 import combined, crc32_of_part


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 5), (5, 0), (1, 1), (7, 1000), (100_000, 65_537)])
def test_the_checksum_of_two_texts_follows_from_theirs(first: int, second: int) -> None:
    text = random.Random(first).randbytes(first + second)
    head, tail = text[:first], text[first:]
    assert combined(zlib.crc32(head), zlib.crc32(tail), second) == zlib.crc32(text)


@pytest.mark.parametrize("maps", [True, False], ids=["mapped", "read, as the system maps nothing"])
def test_the_checksum_of_a_part_of_a_file_is_zlibs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maps: bool
) -> None:
    if not maps:
        monkeypatch.setattr(crc32, "_MADV_POPULATE_READ", 12345)  # unknown, as to Linux before 5.14
    size = 20_000_001  # two windows that are mapped, and some more
    content = random.Random(0).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    for offset, length in ((0, size), (3, 1_048_577), (4097, 17_000_000), (7, 0), (size - 1, 1)):
        expected = zlib.crc32(content[offset : offset + length])
        assert crc32_of_part(tmp_path / "file", offset, length) == expected
    assert crc32_of_part(tmp_path / "file", 1_400_000, size) is None
