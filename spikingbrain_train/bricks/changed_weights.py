"""Which weights of a checkpoint a run has changed."""

from __future__ import annotations

from pathlib import Path

import torch

from spikingbrain_train.architecture.lora import adapter_of
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.conversion.mapping import model_parameters
from spikingbrain_train.conversion.megatron_source import read_model
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint


def check_only_adapter_changed(before: Path, after: Path, name: str) -> int:
    """Hold every weight that is not of an adapter against what it was.

    Args:
        before: checkpoint, or a run's folder, whose newest is taken.
        after: the same of the result.
        name: of the adapter.

    Returns:
        Number of weights that are the same bit for bit: all others.

    Raises:
        CheckpointError: another weight has changed, or a checkpoint cannot be read.
    """
    folders = resolve_checkpoint(before), resolve_checkpoint(after)
    model, (old, new) = read_model(folders[1]), map(MegatronCheckpointReader, folders)
    same = 0
    for parameter in model_parameters(model):
        if adapter_of(parameter.name) == name:
            continue
        # Rows beyond the vocabulary are padding, of which another layout has another number.
        region = (0,) * len(parameter.shape), parameter.shape
        values = [reader.read_region(parameter.name, *region) for reader in (old, new)]
        if not torch.equal(*values):
            raise CheckpointError(
                f"{folders[1]} has another {parameter.name} than {folders[0]}, which adapter {name} does not "
                "own; train again from an undamaged checkpoint"
            )
        same += 1
    return same
