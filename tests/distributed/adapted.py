"""What tests of stages with adapters hold of their result."""

from __future__ import annotations

from pathlib import Path

import torch

from spikingbrain_train.architecture.lora import adapter_of
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.storage.checkpoint_folder import latest_checkpoint


def assert_only_adapters_changed(before: Path, after: Path) -> None:
    """All else is the same bit for bit, and every factor has moved off its start (of B: zero)."""
    old, new = (MegatronCheckpointReader(latest_checkpoint(each, "folder")) for each in (before, after))
    held = {name for name in new.tensors if name.startswith(("decoder.", "embedding."))}
    adapters = {name for name in held if adapter_of(name)}
    assert adapters
    for name in held - adapters:
        region = (0,) * len(old.tensors[name].size), old.tensors[name].size
        assert torch.equal(new.read_region(name, *region), old.read(name)), name
    assert all(new.read(name).any() for name in adapters)
