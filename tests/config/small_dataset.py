"""Indexed datasets of random tokens, written without torch or megatron-core, in its format."""

from __future__ import annotations

import random
import struct
from pathlib import Path

TOKENS = 20
"""Of every document."""


def write_dataset(prefix: Path, documents: int, *, reverse: bool = False) -> str:
    """Write ``prefix``.bin and .idx of 16-bit ids below 500; ``reverse`` turns the order of the tokens round.

    Returns:
        The prefix.
    """
    ids = [random.Random(seed).randrange(500) for seed in range(documents * TOKENS)]
    data = struct.pack(f"<{len(ids)}H", *(reversed(ids) if reverse else ids))
    index = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, documents, documents + 1)
    index += struct.pack(f"<{documents}i", *[TOKENS] * documents)
    index += struct.pack(f"<{documents}q", *(2 * TOKENS * number for number in range(documents)))
    index += struct.pack(f"<{documents + 1}q", *range(documents + 1))
    Path(f"{prefix}.bin").write_bytes(data)
    Path(f"{prefix}.idx").write_bytes(index)
    return str(prefix)
