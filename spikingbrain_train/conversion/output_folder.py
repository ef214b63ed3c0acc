"""Output folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.storage.durable_files import rename_durably, sync_tree
from spikingbrain_train.storage.temporary_folder import REPLACED, remove_abandoned, temporary_folder


def check_output_folder(
    output: Path, *, source: Path, overwrite: bool, marker: str, needed_bytes: int, dry_run: bool = False
) -> None:
    """Refuse, before any work, an output folder that cannot or must not be written.

    What killed calls have left beside it is removed first, as its room may be needed.

    Args:
        output: the folder to be made.
        source: the folder that is read; neither may lie inside the other.
        overwrite: whether an existing folder with content may be replaced.
        marker: file that only a folder made by the same command has; a folder without it is never replaced.
        needed_bytes: size of what will be written.
        dry_run: remove nothing.

    Raises:
        CheckpointError: with the reason and what to change.
    """
    resolved, origin = output.resolve(), source.resolve()
    if resolved == origin or resolved in origin.parents or origin in resolved.parents:
        raise CheckpointError(
            f"--output {output} and the source {source} overlap; choose a folder outside the source"
        )
    if not dry_run:
        remove_abandoned(resolved)
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"--output {output} is a file; choose another folder")
    parent = next(folder for folder in resolved.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{parent} is not writable; choose another --output or change its permissions")
    try:
        occupied = output.exists() and any(output.iterdir())
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise CheckpointError(
            f"--output {output} cannot be used ({error.strerror}); choose another folder"
        ) from None
    if occupied and not overwrite:
        raise CheckpointError(f"--output {output} is not empty; choose another folder or add --overwrite")
    if occupied and not (output / marker).exists():
        raise CheckpointError(
            f"--output {output} has no {marker}, so it was not made by this command and --overwrite leaves "
            "it alone; choose another folder"
        )
    if needed_bytes > free:
        raise CheckpointError(
            f"--output {output} needs {needed_bytes / 1e9:.1f} GB but {parent} has {free / 1e9:.1f} GB free; "
            "make room or choose another folder"
        )


@contextmanager
def complete_folder(output: Path, *, progress: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``output`` when the block ends without an error.

    On any error the temporary folder is removed and what lay at ``output`` is untouched; when the process is
    killed, the next call for the same ``output`` removes it.

    Args:
        output: the folder to be made or replaced.
        progress: say on standard error that the disk is waited for.

    Raises:
        CheckpointError: the disk is full, the folder cannot be written, or the block met an error of the
            operating system with another file.
    """
    output = output.resolve()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(output) as workspace:
            new = workspace / "new"
            new.mkdir()
            try:
                yield new
            except OSError as error:
                if (other := _file_elsewhere(error, workspace)) is None:
                    raise
                raise CheckpointError(
                    f"{other} cannot be used ({_reason(error)}); nothing was changed at {output}"
                ) from error
            try:
                with activity("writing to the disk", shown=progress):
                    _take_place(new, output, workspace / REPLACED)
            except OSError as error:
                if new.exists():
                    raise
                raise CheckpointError(
                    f"{output} is complete, but the disk did not confirm its name ({_reason(error)}); check "
                    "the disk before you rely on it"
                ) from error
    except OSError as error:
        raise CheckpointError(
            f"{output} cannot be written ({_reason(error)}); nothing was changed there"
        ) from error


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _file_elsewhere(error: OSError, folder: Path) -> str | None:
    """The file that an error names, unless it names none or one in ``folder``."""
    names = [
        os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))
    ]
    return names[0] if names and not any(folder in Path(name).parents for name in names) else None


def _take_place(new: Path, output: Path, replaced: Path) -> None:
    sync_tree(new)
    if not output.exists():
        rename_durably(new, output)
        return
    try:
        output.rename(replaced)
        rename_durably(new, output)
    except BaseException:
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        raise
