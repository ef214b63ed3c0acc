"""Checksums of parts give that of the whole."""

from __future__ import annotations

import random
import zlib

import pytest

from spikingbrain_train.storage.crc32 import combined


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 5), (5, 0), (1, 1), (7, 1000), (100_000, 65_537)])
def test_the_checksum_of_two_texts_follows_from_theirs(first: int, second: int) -> None:
    text = random.Random(first).randbytes(first + second)
    head, tail = text[:first], text[first:]
    assert combined(zlib.crc32(head), zlib.crc32(tail), second) == zlib.crc32(text)
