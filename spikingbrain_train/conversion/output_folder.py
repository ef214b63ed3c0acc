"""Output folders that appear whole or not at all, and whose making goes on where a killed call stopped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.storage.durable_files import rename_durably, sync_tree
from spikingbrain_train.storage.journal import Journal, key_of
from spikingbrain_train.storage.temporary_folder import (
    REPLACED,
    abandoned_folders,
    maker_of,
    remove_abandoned,
    temporary_folder,
)

_NEW = "new"
_JOURNAL = "journal.jsonl"


class StoppedEarly(CheckpointError):
    """The work was stopped from outside; what it has done stays for the next call of the same command."""


@dataclass(frozen=True)
class Workspace:
    """Where an output folder is made."""

    new: Path
    """It takes the place of the output when it is complete."""
    journal: Journal
    """What of the work is done."""


@dataclass(frozen=True)
class Leftover:
    """What killed calls of the same command have left."""

    bytes: int = 0
    """On the disk already, of those that will be written."""
    is_complete: bool = False
    """Whether the output was in its place, and only the command had not ended."""


def check_output_folder(
    output: Path,
    *,
    source: Path,
    overwrite: bool,
    marker: str,
    needed_bytes: int,
    key: str | None = None,
    dry_run: bool = False,
) -> Leftover:
    """Refuse, before any work, an output folder that cannot or must not be written.

    What killed calls have left beside it, unless this one goes on with it, is removed first, as its room may
    be needed.

    Args:
        output: the folder to be made.
        source: the folder that is read; neither may lie inside the other.
        overwrite: whether an existing folder with content may be replaced.
        marker: file that only a folder made by the same command has; a folder without it is never replaced.
        needed_bytes: size of what will be written.
        key: of the work, see :func:`resumable_folder`; None goes on with nothing.
        dry_run: remove nothing.

    Returns:
        What is there to go on with.

    Raises:
        CheckpointError: with the reason and what to change.
    """
    resolved, origin = output.resolve(), source.resolve()
    if resolved == origin or resolved in origin.parents or origin in resolved.parents:
        raise CheckpointError(
            f"--output {output} and the source {source} overlap; choose a folder outside the source"
        )
    if (maker := maker_of(resolved)) is not None:
        raise CheckpointError(
            f"--output {output} is being written by another command ({maker}); wait for it or choose another "
            "folder"
        )
    if not dry_run:
        remove_abandoned(resolved, but=lambda folder: _has_key(folder, key) or _is_in_place(folder))
    leftover = _leftover(resolved, key)
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"--output {output} is a file; choose another folder")
    if os.path.ismount(resolved):  # renaming onto it would fail when all the work is done
        raise CheckpointError(
            f"--output {output} is a mount point, whose place no folder can take; choose a folder in it"
        )
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
    if occupied and (leftover.is_complete or (dry_run and key is None and _any_in_place(resolved))):
        return leftover
    if not dry_run:
        remove_abandoned(resolved, but=lambda folder: _has_key(folder, key))
    if occupied and not overwrite:
        raise CheckpointError(f"--output {output} is not empty; choose another folder or add --overwrite")
    if occupied and not (output / marker).exists():
        raise CheckpointError(
            f"--output {output} has no {marker}, so it was not made by this command and --overwrite leaves "
            "it alone; choose another folder"
        )
    needed_bytes -= leftover.bytes
    if needed_bytes > free:
        raise CheckpointError(
            f"--output {output} needs {_amount(needed_bytes)} but {parent} has {_amount(free)} free; make "
            "room or choose another folder"
        )
    return leftover


def _amount(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number < 10**9 else f"{number / 1e9:.1f} GB"


def _has_key(folder: Path, key: str | None) -> bool:
    return key is not None and key_of(folder / _JOURNAL) == key


def _is_in_place(folder: Path) -> bool:
    """Whether what was made in a temporary folder had already left it for its place."""
    return key_of(folder / _JOURNAL) is not None and not (folder / _NEW).exists()


def _any_in_place(output: Path) -> bool:
    return any(_is_in_place(folder) for folder in abandoned_folders(output))


def _leftover(output: Path, key: str | None) -> Leftover:
    for folder in abandoned_folders(output):
        if not _has_key(folder, key):
            continue
        if not _is_in_place(folder):
            files = [path for path in (folder / _NEW).rglob("*") if path.is_file()]
            return Leftover(bytes=sum(path.stat().st_blocks * 512 for path in files))
        if output.exists():
            return Leftover(is_complete=True)
    return Leftover()


def clear_leftover(output: Path) -> None:
    """Remove what a call left that was killed after its output had taken its place."""
    remove_abandoned(output.resolve())


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
    with resumable_folder(output, None, progress=progress) as workspace:
        yield workspace.new


@contextmanager
def resumable_folder(output: Path, key: str | None, *, progress: bool = False) -> Iterator[Workspace]:
    """:func:`complete_folder`, going on in what a call with the same ``key`` left that was killed.

    An interrupt from the keyboard and :class:`StoppedEarly` leave it too if the journal holds a result. On
    any other error it is removed: a full disk gets its room back.

    Args:
        output: the folder to be made or replaced.
        key: what the work depends on; None goes on with nothing.
        progress: say on standard error that the disk is waited for.

    Raises:
        CheckpointError: as :func:`complete_folder`.
    """
    output = output.resolve()
    journal: Journal | None = None

    def keeps(error: BaseException) -> bool:
        return isinstance(error, (KeyboardInterrupt, StoppedEarly)) and bool(journal and journal.entries)

    try:
        replaces = _has_content(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(
            output,
            goes_on=lambda folder: _has_key(folder, key) and (folder / _NEW).is_dir(),
            keeps=keeps if key is not None else None,
        ) as workspace:
            new = workspace / _NEW
            new.mkdir(exist_ok=True)
            journal = Journal(workspace / _JOURNAL, "" if key is None else key)
            try:
                yield Workspace(new, journal)
            except OSError as error:
                if (other := _file_elsewhere(error, workspace)) is None:
                    raise
                raise CheckpointError(
                    f"{other} cannot be used ({_reason(error)}); nothing was changed at {output}"
                ) from error
            if not replaces and _has_content(output):
                raise CheckpointError(
                    f"{output} was made by another command meanwhile; nothing was changed there: choose "
                    "another folder, or add --overwrite"
                )
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


def _has_content(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


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
