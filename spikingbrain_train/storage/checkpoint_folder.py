"""Where things lie in a checkpoint folder. Reads small text files only: torch is not needed.

<folder>/latest_checkpointed_iteration.txt      the newest iteration, a number
<folder>/iter_0000100/model_config.yaml         the architecture
<folder>/iter_0000100/run_config.yaml           the run that wrote it (training only)
<folder>/iter_0000100/run_record.json           its ranks and fingerprints of its tokens (training only)
<folder>/iter_0000100/hf_source/                configuration and tokenizer of the Hugging Face source
<folder>/iter_0000100/.metadata, *.distcp, ...  weights in megatron-core's torch_dist format
<folder>/iter_0000100/manifest.json             checksums of those, and of what lies beside
<folder>/iter_0000100.superseded                left behind by a run that went on from an older one
<folder>/iter_0000100.damaged                   left behind by a run with checkpoint.on_damage=previous
<folder>/.iter_0000100.incomplete               being written, or left by a run that was killed
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage.checkpoint_manifest import read_manifest
from spikingbrain_train.storage.durable_files import rename_durably, write_text_durably

LATEST_ITERATION_FILE = "latest_checkpointed_iteration.txt"
MODEL_CONFIG_FILE = "model_config.yaml"
RUN_CONFIG_FILE = "run_config.yaml"
HF_SOURCE_FOLDER = "hf_source"
CONVERSION_REPORT_FILE = "conversion_report.json"
"""What a conversion said of itself: beside the iterations of an import, and in an exported folder."""
CHECKPOINT_FOLDER = "checkpoints"
"""Checkpoint folder of a run, in its output_dir."""

_ITERATION_FOLDER = re.compile(r"iter_(\d{7,9})")
_NEEDED = (MODEL_CONFIG_FILE, ".metadata")


def iteration_folder(folder: str | Path, iteration: int) -> Path:
    """The folder of one iteration: ``<folder>/iter_0000100``."""
    return Path(folder) / f"iter_{iteration:07d}"


def is_iteration_folder(checkpoint: Path) -> bool:
    """Whether a folder is named ``iter_0000100``; a copy may have any name."""
    return _ITERATION_FOLDER.fullmatch(checkpoint.name) is not None


def iteration_of(checkpoint: Path) -> int:
    """The iteration of a folder named ``iter_0000100``."""
    return int(checkpoint.name.removeprefix("iter_"))


def incomplete_folder(checkpoint: Path) -> Path:
    """Where a checkpoint is written until it is complete."""
    return checkpoint.with_name(f".{checkpoint.name}.incomplete")


def remove_incomplete(folder: str | Path) -> None:
    """Remove what killed runs left of checkpoints that they were writing."""
    for left in Path(folder).glob(".iter_*.incomplete"):
        shutil.rmtree(left, ignore_errors=True)
    for left in Path(folder).glob(f".{LATEST_ITERATION_FILE}.*"):
        left.unlink(missing_ok=True)


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


def iterations(folder: str | Path) -> list[int]:
    """The iterations that have a folder, complete or not, in ascending order."""
    path = Path(folder)
    names = [child.name for child in path.iterdir()] if path.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _ITERATION_FOLDER.fullmatch(name)))


def is_complete(checkpoint: Path) -> bool:
    """Whether all that belongs to a checkpoint lies in its folder, in full length; contents are not read."""
    try:
        if manifest := read_manifest(checkpoint):
            manifest.check_sizes()
    except (CheckpointError, OSError):
        return False
    return all((checkpoint / needed).is_file() for needed in _NEEDED)


def check_is_whole(checkpoint: Path) -> None:
    """Raise :class:`CheckpointError` where a file is missing without which nothing can be read."""
    for needed in _NEEDED:
        if not (checkpoint / needed).is_file():
            raise CheckpointError(f"{checkpoint / needed} is missing; copy the checkpoint again")


def newest_complete_iteration(folder: str | Path, below: int | None = None) -> int | None:
    """The newest iteration (older than ``below``) whose folder is complete, or None."""
    for iteration in reversed(iterations(folder)):
        if (below is None or iteration < below) and is_complete(iteration_folder(folder, iteration)):
            return iteration
    return None


def newest_iteration(folder: str | Path) -> int | None:
    """The iteration that a run in ``folder`` goes on from, None where no checkpoint has been written.

    It is what the tracker file names or, where that was lost, the newest complete folder.

    Raises:
        CheckpointError: the tracker file does not hold a number, or it is missing and no folder is complete.
    """
    tracked = latest_iteration(folder)
    if tracked is not None:
        return tracked
    newest = newest_complete_iteration(folder)
    if newest is None and (found := iterations(folder)):
        raise CheckpointError(
            f"{iteration_folder(folder, found[-1])} is incomplete, and {folder} has neither a complete "
            f"checkpoint nor a {LATEST_ITERATION_FILE}; move the iter_* folders away, or choose another "
            "output_dir"
        )
    return newest


def set_latest_iteration(folder: str | Path, iteration: int) -> None:
    """Make ``iteration`` the newest; its folder is complete and synced."""
    write_text_durably(Path(folder) / LATEST_ITERATION_FILE, f"{iteration}\n")


def set_aside(checkpoint: Path, why: str = "superseded") -> Path:
    """Rename a checkpoint that another one takes the place of, so that it stays and is no longer counted.

    Args:
        checkpoint: its folder.
        why: what its name ends with from now on.

    Returns:
        Its new name.
    """
    number, name = 1, f"{checkpoint.name}.{why}"
    while checkpoint.with_name(name).exists():
        number += 1
        name = f"{checkpoint.name}.{why}-{number}"
    rename_durably(checkpoint, checkpoint.with_name(name))
    return checkpoint.with_name(name)


def set_aside_newer(folder: str | Path, iteration: int) -> list[Path]:
    """Rename every checkpoint newer than the one that a run goes on from; returns the new names."""
    return [set_aside(iteration_folder(folder, newer)) for newer in iterations(folder) if newer > iteration]


def advice_to_go_back(folder: str | Path, damaged: int) -> str:
    """How to go on without iteration ``damaged``: names the newest complete one that is older."""
    older = newest_complete_iteration(folder, below=damaged)
    if older is None:
        return "there is no older complete checkpoint beside it"
    return (
        f"{iteration_folder(folder, older)} is complete: write {older} into {LATEST_ITERATION_FILE} to go on "
        "from there"
    )


def way_back(folder: Path) -> str:
    """What a run that diverged goes on from."""
    newest = latest_iteration(folder)
    if newest is None:
        return "start again (this run has saved no checkpoint)"
    return f"go on from {iteration_folder(folder, newest)}"


def latest_checkpoint(folder: str | Path, setting: str) -> Path:
    """The folder of the newest iteration in a checkpoint folder that ``setting`` names.

    Raises:
        CheckpointError: the folder is missing, holds no checkpoint, or an incomplete one; names ``setting``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{setting}={folder} is not a folder; name one that spikingbrain-convert or a run wrote"
        )
    iteration = latest_iteration(folder)
    if iteration is None:
        if _ITERATION_FOLDER.fullmatch(folder.name):
            raise CheckpointError(
                f"{setting}={folder} is one iteration; name the folder above it: {setting}={folder.parent}"
            )
        if (folder / CHECKPOINT_FOLDER / LATEST_ITERATION_FILE).is_file():
            raise CheckpointError(
                f"{setting}={folder} is the folder of a run; name its checkpoints: "
                f"{setting}={folder / CHECKPOINT_FOLDER}"
            )
        newest = newest_complete_iteration(folder)
        if newest is not None:
            raise CheckpointError(
                f"{setting}={folder} has lost its {LATEST_ITERATION_FILE}; write {newest} into it to take "
                f"{iteration_folder(folder, newest)}, the newest complete checkpoint there"
            )
        raise CheckpointError(
            f"{setting}={folder} has no {LATEST_ITERATION_FILE}, so it is not a checkpoint folder; "
            f"name one that spikingbrain-convert or a run wrote"
        )
    checkpoint = iteration_folder(folder, iteration)
    for needed in _NEEDED:
        if not (checkpoint / needed).is_file():
            raise CheckpointError(
                f"{setting}={folder} names iteration {iteration} as its newest, but {checkpoint / needed} is "
                f"missing; {advice_to_go_back(folder, iteration)}"
            )
    return checkpoint
