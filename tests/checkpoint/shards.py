"""Shards of a checkpoint, saved at once: what a run does in steps, between which it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spikingbrain_train.checkpoint.torch_dist import ShardWriters


def save_shards(sharded: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint's shards from all ranks, and wait for it."""
    writers = ShardWriters(sharded, folder)
    writers.write()
    writers.finish()
