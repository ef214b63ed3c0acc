"""A small run with checkpoints 2, 4 and 6, which tests damage, and how a run in its folder ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import SpikingBrainError
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER, iteration_folder
from tests.distributed.small_runs import MODEL, checkpoint_config, run_config, train

ONE_RANK = ParallelConfig()


def saving_config(
    folder: Path,
    text: Path,
    train_iters: int,
    *,
    model: ModelConfig = MODEL,
    parallel: ParallelConfig = ONE_RANK,
    **checkpoint: Any,
) -> RunConfig:
    """A run of so many steps that saves every second one; ``checkpoint`` replaces its settings."""
    config = run_config(folder, text, model=model, parallel=parallel)
    config.stage = replace(config.stage, train_iters=train_iters)
    config.checkpoint = checkpoint_config(**{"save_interval": 2, **checkpoint})
    return config


def checkpoint_of(run: Path, iteration: int) -> Path:
    """The folder of a checkpoint in the output_dir ``run``."""
    return iteration_folder(run / CHECKPOINT_FOLDER, iteration)


def outcome(groups: ProcessGroups, config: RunConfig) -> tuple[str, str]:
    """Kind and sentence of what ends a run, or nothing and its number of steps; for ranks of the pool."""
    try:
        return "", str(len(train(groups, config)))
    except SpikingBrainError as error:
        return type(error).__name__, str(error)
