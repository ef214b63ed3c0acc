"""What the bytes of a conversion depend on, in one line: work with another key is not gone on with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

import spikingbrain_train

_RECORDS = "2"
"""Raised with what parts record: a call cannot go on with records of another form."""


def work_key(kind: str, *facts: object) -> str:
    """A key of everything that decides what is written.

    Args:
        kind: "import" or "export".
        facts: dataclasses, lists, numbers and words, whose representation says all of them.
    """
    words = [kind, _RECORDS, spikingbrain_train.__version__, torch.__version__, *map(repr, facts)]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def source_files(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Name, bytes and time of the last change (ns) of files: who changes one starts anew.

    Raises:
        OSError: one is not there.
    """
    found = []
    for path in sorted(paths):
        state = path.stat()
        found.append((path.name, state.st_size, state.st_mtime_ns))
    return found
