"""Output folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spikingbrain_train.config.errors import CheckpointError


def check_output_folder(
    output: Path, *, source: Path, overwrite: bool, marker: str, needed_bytes: int
) -> None:
    """Refuse, before any work, an output folder that cannot or must not be written.

    Args:
        output: the folder to be made.
        source: the folder that is read; neither may lie inside the other.
        overwrite: whether an existing folder with content may be replaced.
        marker: file that only a folder made by the same command has; a folder without it is never replaced.
        needed_bytes: size of what will be written.

    Raises:
        CheckpointError: with the reason and what to change.
    """
    resolved, origin = output.resolve(), source.resolve()
    if resolved == origin or resolved in origin.parents or origin in resolved.parents:
        raise CheckpointError(
            f"--output {output} and the source {source} overlap; choose a folder outside the source"
        )
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
            f"it alone; "
            "choose another folder"
        )
    if needed_bytes > free:
        raise CheckpointError(
            f"--output {output} needs {needed_bytes / 1e9:.1f} GB but {parent} has {free / 1e9:.1f} GB free; "
            f"make room or "
            "choose another folder"
        )


@contextmanager
def complete_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``output`` that takes its place when the block ends without an error.

    On any error the temporary folder is removed and what lay at ``output`` is untouched.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    output = output.resolve()
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        _take_place(temporary, output)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise CheckpointError(
                f"{output} cannot be written ({reason}); nothing was changed there"
            ) from error
        raise


def _take_place(temporary: Path, output: Path) -> None:
    if not output.exists():
        temporary.rename(output)
        return
    replaced = output.with_name(f"{output.name}.old-{os.getpid()}")
    output.rename(replaced)
    try:
        temporary.rename(output)
    except OSError:
        replaced.rename(output)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
