"""The files below a folder of inputs, with an account of what is not read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

HIDDEN = "hidden folder"
DANGLING = "link to nothing"
UNREADABLE = "folder that may not be read"
SIDECAR = "description of a tokenized dataset"
OTHER_TYPE = "file of another type"

_SIDECAR_BYTES = 1 << 16


class LeftOut:
    """What lies among the inputs and is not read."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, None]] = {}

    def add(self, kind: str, path: Path) -> None:
        """Note a file or folder; the same one counts once."""
        self._found.setdefault(kind, {})[str(path)] = None

    def describe(self) -> list[str]:
        """A line for each kind, with the number and the first."""
        return [
            f"not read: {len(paths):,} x {kind}, first {next(iter(paths))}"
            for kind, paths in self._found.items()
        ]


def files_below(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """All files in ``folder`` and its sub-folders, hidden ones (``.ipynb_checkpoints``) left out.

    Links are followed; a folder that several ways lead to is entered once, so a link to a folder above is no
    trap.
    """
    entered: set[str] = set()
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        # By name, not by inode: some network file systems hand out the same numbers twice.
        real = os.path.realpath(current)
        if real in entered:
            continue
        entered.add(real)
        try:
            names = sorted(os.listdir(current))
        except OSError:
            left_out.add(UNREADABLE, current)
            continue
        for name in names:
            path = current / name
            if os.path.isdir(path):
                if name.startswith("."):
                    left_out.add(HIDDEN, path)
                else:
                    waiting.append(path)
            elif os.path.isfile(path):
                yield path
            else:
                left_out.add(special_kind(path), path)


def special_kind(path: Path) -> str:
    """What is neither file nor folder: a link to nothing, or a pipe, a socket or a device."""
    return OTHER_TYPE if os.path.exists(path) else DANGLING


def is_sidecar(path: Path) -> bool:
    """Whether ``path`` describes the tokenized dataset beside it, and holds no documents."""
    if path.suffix != ".json" or not all(path.with_suffix(suffix).is_file() for suffix in (".bin", ".idx")):
        return False
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_SIDECAR_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "tokenizer_fingerprint" in content
