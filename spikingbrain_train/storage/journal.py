"""What a long piece of work has done, so that another call can go on where this one was killed.

One JSON object a line, each on the disk before the next is begun. A line that was cut off is not read.
Imports no torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_VERSION = 1


class Journal:
    """Results by name, in a file that begins with the key of the work.

    Args:
        path: the file. One with the same key is gone on with; any other is replaced.
        key: what the results depend on: work with another key has no use for them.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.entries: dict[str, Any] = {}
        """Results so far, in the order they were added."""
        if key_of(path) == key:
            self._read()
            return
        path.unlink(missing_ok=True)
        self._append({"version": _VERSION, "key": key})

    def add(self, name: str, value: Any) -> Any:
        """Write down a result, of values that JSON knows, and wait until it is on the disk.

        Returns:
            The result as another call would read it: pickles tell one string from two equal ones.
        """
        self._append({"name": name, "value": value})
        self.entries[name] = json.loads(json.dumps(value))
        return self.entries[name]

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        whole = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                entry = _entry(line)
                if entry is None or (number > 0 and "name" not in entry):
                    break
                if number > 0:
                    self.entries[entry["name"]] = entry.get("value")
                whole += len(line)
        os.truncate(self.path, whole)  # what follows would else be appended to half a line


def key_of(path: Path) -> str | None:
    """The key in the journal at ``path``; None where there is none that can be gone on with."""
    try:
        with path.open("rb") as file:
            first = _entry(file.readline())
    except OSError:
        return None
    if first is None or first.get("version") != _VERSION:
        return None
    key = first.get("key")
    return key if isinstance(key, str) else None


def _entry(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
