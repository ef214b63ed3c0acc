"""Random numbers that depend on a seed and a name alone.

They are the same whatever the number of layers, the order of conversion or the topology that later loads
them.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, name: str) -> torch.Generator:
    """The random numbers of ``name``."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
