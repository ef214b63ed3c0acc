"""Where things lie in a checkpoint folder. Reads small text files only: torch is not needed.

<folder>/latest_checkpointed_iteration.txt      the newest iteration, a number
<folder>/iter_0000100/model_config.yaml         the architecture
<folder>/iter_0000100/run_config.yaml           the run that wrote it (training only)
<folder>/iter_0000100/hf_source/                configuration and tokenizer of the Hugging Face source
<folder>/iter_0000100/.metadata, *.distcp, ...  weights in megatron-core's torch_dist format
"""

from __future__ import annotations

import re
from pathlib import Path

from spikingbrain_train.config.errors import CheckpointError

LATEST_ITERATION_FILE = "latest_checkpointed_iteration.txt"
MODEL_CONFIG_FILE = "model_config.yaml"
RUN_CONFIG_FILE = "run_config.yaml"
HF_SOURCE_FOLDER = "hf_source"
CHECKPOINT_FOLDER = "checkpoints"
"""Checkpoint folder of a run, in its output_dir."""


def iteration_folder(folder: str | Path, iteration: int) -> Path:
    """The folder of one iteration: ``<folder>/iter_0000100``."""
    return Path(folder) / f"iter_{iteration:07d}"


def latest_iteration(folder: str | Path) -> int | None:
    """The newest complete iteration in ``folder``, or None where no checkpoint has been written.

    Raises:
        CheckpointError: the tracker file does not hold a number.
    """
    tracker = Path(folder) / LATEST_ITERATION_FILE
    if not tracker.is_file():
        return None
    content = tracker.read_text(errors="replace").strip()
    if not re.fullmatch(r"\d{1,9}", content):
        raise CheckpointError(
            f"{tracker} holds {content[:40]!r} instead of an iteration number; "
            f"write the number of a complete iter_* folder beside it into the file"
        )
    return int(content)


def latest_checkpoint(folder: str | Path, setting: str) -> Path:
    """The folder of the newest iteration in a checkpoint folder that ``setting`` names.

    Raises:
        CheckpointError: the folder is missing, holds no checkpoint, or an incomplete one; names ``setting``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{setting}={folder} is not a folder; name one that tools/convert_checkpoint.py or train.py wrote"
        )
    iteration = latest_iteration(folder)
    if iteration is None:
        if re.fullmatch(r"iter_\d{7}", folder.name):
            raise CheckpointError(
                f"{setting}={folder} is one iteration; name the folder above it: {setting}={folder.parent}"
            )
        if (folder / CHECKPOINT_FOLDER / LATEST_ITERATION_FILE).is_file():
            raise CheckpointError(
                f"{setting}={folder} is the folder of a run; name its checkpoints: "
                f"{setting}={folder / CHECKPOINT_FOLDER}"
            )
        raise CheckpointError(
            f"{setting}={folder} has no {LATEST_ITERATION_FILE}, so it is not a checkpoint folder; "
            f"name one that tools/convert_checkpoint.py or train.py wrote"
        )
    checkpoint = iteration_folder(folder, iteration)
    for needed in (MODEL_CONFIG_FILE, ".metadata"):
        if not (checkpoint / needed).is_file():
            raise CheckpointError(
                f"{setting}={folder} names iteration {iteration} as its newest, but {checkpoint / needed} is "
                f"missing; "
                f"write the number of a complete iter_* folder into {LATEST_ITERATION_FILE}"
            )
    return checkpoint
