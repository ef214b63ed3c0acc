"""Which checkpoint a path means. Decided before torch is there."""

from __future__ import annotations

from pathlib import Path

from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage.checkpoint_folder import (
    CHECKPOINT_FOLDER,
    LATEST_ITERATION_FILE,
    MODEL_CONFIG_FILE,
    advice_to_go_back,
    is_iteration_folder,
    iteration_of,
    iterations,
    latest_checkpoint,
)

METADATA_FILE = ".metadata"
"""File that only the folder of one checkpoint in torch's format has."""


def holds_checkpoint(path: Path) -> bool:
    """Whether ``path`` has the marks of a Megatron checkpoint, of a folder of them, or of a run's folder.

    An ``iter_*`` folder has them even where it is incomplete.
    """
    marks = (METADATA_FILE, LATEST_ITERATION_FILE, MODEL_CONFIG_FILE, CHECKPOINT_FOLDER)
    names_one = is_iteration_folder(path) and path.is_dir()
    return names_one or any((path / mark).exists() for mark in marks) or bool(iterations(path))


def resolve_checkpoint(path: Path, setting: str = "--checkpoint") -> Path:
    """The folder of one checkpoint: ``path`` itself if it is an ``iter_*`` folder, else the newest one in it.

    Raises:
        CheckpointError: there is no complete Megatron checkpoint; names ``setting``.
    """
    if (path / METADATA_FILE).is_file():
        return path
    if is_iteration_folder(path) and path.is_dir():
        raise CheckpointError(
            f"{setting}={path} is incomplete: it has no {METADATA_FILE}; "
            f"{advice_to_go_back(path.parent, iteration_of(path))}"
        )
    is_run = not (path / LATEST_ITERATION_FILE).is_file() and (path / CHECKPOINT_FOLDER).is_dir()
    return latest_checkpoint(path / CHECKPOINT_FOLDER if is_run else path, setting)
