"""What is done to projections, as it stood when a checkpoint was written: k of spikes that are annealed.

What an export cannot hold as it stood (weights on their way to INT8 numbers) it says.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.linear_transforms import transforms_of
from spikingbrain_train.config.load import load_run_config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.storage.checkpoint_folder import RUN_CONFIG_FILE, is_iteration_folder, iteration_of


def at_its_iteration(model: ModelConfig, checkpoint: Path) -> ModelConfig:
    """``model`` with the settings that its run's schedules had reached in the ``iter_*`` folder.

    A checkpoint that no run wrote keeps the model's own.

    Raises:
        CheckpointError: its run_config.yaml cannot be read.
    """
    stage = _stage_of(model, checkpoint)
    if stage is None:
        return model
    for kind in transforms_of(model):
        settings: Any = getattr(model, kind.name, None)
        reached = {
            name: value
            for name, value in kind.schedule(model, stage, iteration_of(checkpoint)).items()
            if hasattr(settings, name)
        }
        if reached:
            section: dict[str, Any] = {kind.name: replace(settings, **reached)}
            model = replace(model, **section)
    return model


def notes_on_schedules(model: ModelConfig, checkpoint: Path) -> list[str]:
    """How an export of the ``iter_*`` folder is ahead of what its run computed there, as sentences.

    Raises:
        CheckpointError: its run_config.yaml cannot be read.
    """
    stage = _stage_of(model, checkpoint)
    if stage is None:
        return []
    iteration = iteration_of(checkpoint)
    notes = [kind.ahead_of(model, stage, iteration) for kind in transforms_of(model)]
    if (share := stage.sub_norm_annealing.share(iteration)) < 1.0:
        notes.append(
            f"the checkpoint lies within stage.sub_norm_annealing, after {iteration} of "
            f"{stage.sub_norm_annealing.anneal_iters} steps: its sub-norms had come in by {share:.0%}, and "
            f"the export has whole ones"
        )
    return [note for note in notes if note]


def _stage_of(model: ModelConfig, checkpoint: Path) -> StageConfig | None:
    """Of the run that wrote a checkpoint of a model with anything on a schedule; None if no run did."""
    stored_run = checkpoint / RUN_CONFIG_FILE
    has_schedules = bool(transforms_of(model)) or model.attn_sub_norm or model.ffn_sub_norm
    if not has_schedules or not is_iteration_folder(checkpoint) or not stored_run.is_file():
        return None
    return load_run_config(stored_run).stage
