"""Which of its checkpoints a run goes on from, where some are damaged.

Read are sizes, and what is small; the weights themselves are held to their checksums when they are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spikingbrain_train.config.run import OnDamage
from spikingbrain_train.errors import CheckpointError, DamagedCheckpointError
from spikingbrain_train.storage.checkpoint_folder import (
    advice_to_go_back,
    check_is_whole,
    iteration_folder,
    iterations,
    newest_complete_iteration,
    newest_iteration,
)
from spikingbrain_train.storage.checkpoint_manifest import MANIFEST_FILE, read_manifest

_WEIGHTS = ".distcp"


@dataclass(frozen=True)
class Damage:
    """A checkpoint that nothing can go on from."""

    checkpoint: Path
    reason: str


@dataclass(frozen=True)
class Soundness:
    """What a folder of checkpoints offers."""

    newest: int | None
    """The iteration to go on from, None where no checkpoint has been written."""
    damaged: tuple[Damage, ...] = ()
    """Those that were newer."""


def newest_sound(folder: Path, on_damage: OnDamage) -> Soundness:
    """The newest checkpoint that is what was saved, as far as sizes and small files tell.

    Args:
        folder: checkpoint folder of the run.
        on_damage: whether older ones may take the place of a damaged one.

    Raises:
        DamagedCheckpointError: the newest is damaged, and no older one may take its place, or all are.
        CheckpointError: no folder is complete, or the file that names the newest holds no number.
    """
    newest = _newest(folder, on_damage)
    if newest is None:
        return Soundness(None)
    candidates = sorted({newest, *(each for each in iterations(folder) if each <= newest)})
    manifests_are_written = any(
        (iteration_folder(folder, each) / MANIFEST_FILE).exists() for each in candidates
    )
    damaged: list[Damage] = []
    for iteration in reversed(candidates):
        checkpoint = iteration_folder(folder, iteration)
        reason = _damage(checkpoint, needs_manifest=manifests_are_written)
        if reason is None:
            return Soundness(iteration, tuple(damaged))
        damaged.append(Damage(checkpoint, reason))
        if on_damage is OnDamage.stop:
            advice = advice_to_go_back(folder, iteration)
            raise DamagedCheckpointError(
                f"output_dir: {reason}; {advice}, or set checkpoint.on_damage=previous"
            )
    raise DamagedCheckpointError(
        f"output_dir: none of the {len(damaged)} checkpoints in {folder} is whole (of the newest, "
        f"{damaged[0].reason}); copy one of them again, or choose another output_dir to start anew"
    )


def _newest(folder: Path, on_damage: OnDamage) -> int | None:
    try:
        return newest_iteration(folder)
    except CheckpointError:
        if on_damage is OnDamage.stop or (newest := newest_complete_iteration(folder)) is None:
            raise
        return newest


def _damage(checkpoint: Path, *, needs_manifest: bool) -> str | None:
    """What is wrong with a checkpoint, None where nothing is seen to be.

    Args:
        checkpoint: its folder.
        needs_manifest: whether it was written with a manifest, as those beside it were.
    """
    try:
        manifest = read_manifest(checkpoint)
        if manifest is not None:
            manifest.check_sizes()
            for name in manifest.files:
                if not name.endswith(_WEIGHTS):
                    manifest.check_file(name)
            manifest.check_beside()
        elif needs_manifest and checkpoint.is_dir():
            raise CheckpointError(f"{checkpoint / MANIFEST_FILE} is missing; copy the checkpoint again")
        check_is_whole(checkpoint)
    except (CheckpointError, FileNotFoundError) as error:
        return str(error)
    except OSError as error:  # of the storage, which says nothing of what was stored
        raise CheckpointError(
            f"output_dir: {checkpoint} cannot be read ({error}); mend that and start again"
        ) from error
    return None
