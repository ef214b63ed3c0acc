"""``manifest.json`` of a checkpoint: the checksum of every part of its files, written when they are complete.

A part is what is read at once: one chunk of a tensor in a ``.distcp`` file; other files are one part. So a
reader checks what it reads and no more, at about the speed of reading it. A flipped bit, a
hole of zeros and a file of another save all show. What lies beside the weights (configuration, tokenizer) is
listed apart: the run that goes on from it holds it to its checksum, all others take it as it is. Checkpoints
without a manifest (of Megatron-LM, or older than manifests) are read unchecked. Reads plain files:
torch is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage.crc32 import crc32_of_part
from spikingbrain_train.storage.durable_files import write_text_durably

MANIFEST_FILE = "manifest.json"

_VERSION = 1

Parts = list[tuple[int, int, int]]
"""(offset, bytes, CRC-32) of every part of a file, in order and without gaps."""


def checksums(path: Path, ranges: Iterable[tuple[int, int]] | None = None) -> Parts:
    """Read the parts of a file.

    Args:
        path: a complete file.
        ranges: (offset, bytes) of its parts; None is one part for all of it.
    """
    if ranges is None:
        ranges = [(0, path.stat().st_size)]
    return [(offset, length, _crc32(path, offset, length)) for offset, length in sorted(ranges)]


def _crc32(path: Path, offset: int, length: int) -> int:
    """Of a part; no checksum at all where the file is too short."""
    found = crc32_of_part(path, offset, length)
    return -1 if found is None else found


def write_manifest(folder: Path, files: Mapping[str, Parts]) -> None:
    """Write the manifest of a complete checkpoint folder.

    Args:
        folder: of the checkpoint.
        files: names of the files that hold weights, and their parts; all others are read here.
    """
    beside = {name: checksums(folder / name)[0][1:] for name in _files(folder) if name not in files}
    content = {
        "version": _VERSION,
        "files": {name: files[name] for name in sorted(files)},
        "beside": beside,
    }
    write_text_durably(folder / MANIFEST_FILE, json.dumps(content, separators=(",", ":")) + "\n")


def _files(folder: Path) -> list[str]:
    """Names of all files below a folder; a link is no file of the checkpoint, nor is the manifest."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sorted({path.relative_to(folder).as_posix() for path in paths} - {MANIFEST_FILE})


@dataclass(frozen=True)
class Manifest:
    """What the files of a checkpoint held when it was saved."""

    folder: Path
    files: Mapping[str, Mapping[int, tuple[int, int]]]
    """Name -> offset of a part -> (bytes, CRC-32); what holds weights."""
    beside: Mapping[str, tuple[int, int]]
    """Path -> (bytes, CRC-32) of what lies beside the weights."""

    def check_sizes(self) -> None:
        """Raise :class:`CheckpointError` where a file is missing or shorter or longer than it was."""
        for name, parts in self.files.items():
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; copy the checkpoint again")
            found, saved = path.stat().st_size, sum(length for length, _ in parts.values())
            if found != saved:
                raise CheckpointError(
                    f"{path} is damaged: it has {found} bytes of {saved}; copy the checkpoint again"
                )

    def check_beside(self) -> None:
        """Raise :class:`CheckpointError` where a file beside the weights is missing or not what was saved."""
        for name, (length, crc32) in self.beside.items():
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; copy the checkpoint again")
            if path.stat().st_size != length or _crc32(path, 0, length) != crc32:
                raise CheckpointError(
                    f"{path} is damaged, or was changed since it was saved; copy the checkpoint again"
                )

    def check_file(self, name: str) -> None:
        """Raise :class:`CheckpointError` where a file is not what was saved; unknown files pass."""
        for offset, (length, _) in self.files.get(name, {}).items():
            self.check_part(name, offset, length)

    def check_part(self, name: str, offset: int, length: int) -> None:
        """Raise :class:`CheckpointError` where a part of a file is not what was saved.

        Args:
            name: of the file.
            offset: where the part begins.
            length: its bytes.
        """
        self.check_known(name, offset, length, _crc32(self.folder / name, offset, length))

    def check_parts(self, parts: Iterable[tuple[str, int, int]], threads: int) -> None:
        """:meth:`check_part` of many, some at a time.

        Args:
            parts: names of files, and the first byte and bytes of each part.
            threads: how many are read at a time: while one waits for its bytes, another computes.

        Raises:
            CheckpointError: about the first of them that is not what was saved.
            OSError: one cannot be read.
        """
        if threads == 1:
            for part in parts:
                self.check_part(*part)
            return
        pool = ThreadPoolExecutor(threads, "verification")
        try:
            for checked in [pool.submit(self.check_part, *part) for part in parts]:
                checked.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def check_known(self, name: str, offset: int, length: int, crc32: int) -> None:
        """:meth:`check_part` of what has been read already, whose CRC-32 is known."""
        path = self.folder / name
        if self.files.get(name, {}).get(offset) != (length, crc32):
            raise CheckpointError(
                f"{path} is damaged or of another save: bytes {offset} to {offset + length} differ from what "
                f"{MANIFEST_FILE} says was saved; copy the checkpoint again"
            )


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint folder, None where it has none.

    Raises:
        CheckpointError: it is damaged, or of a later version of this project.
    """
    path = folder / MANIFEST_FILE
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        version, files = content["version"], content["files"]
        parsed = {
            str(name): {int(offset): (int(length), int(crc)) for offset, length, crc in parts}
            for name, parts in files.items()
        }
        beside = {
            str(name): (int(length), int(crc)) for name, (length, crc) in content.get("beside", {}).items()
        }
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{path} is damaged; copy the checkpoint again") from None
    if version != _VERSION:
        raise CheckpointError(
            f"{path} has version {version}, which this version of the project does not know; update it"
        )
    inside = [Path(name).name == name for name in parsed]
    inside += [not Path(name).is_absolute() and ".." not in Path(name).parts for name in beside]
    if not all(inside):
        raise CheckpointError(f"{path} points outside of its folder; copy the checkpoint again")
    return Manifest(folder, parsed, beside)
