"""Where copies of a run's state lie in the memory of a host. Torch is not needed.

<checkpoint.memory_folder>/spikingbrain-train-0f3a.../      of one output_dir
    <run>/rank_00003/iter_0000100/                          what rank 3 kept of step 100
    <run>/rank_00003.copy/iter_0000100/                     the same, kept for rank 3 on another host
    <run>/rank_00003/.iter_0000200.incomplete/              being written, or left by a killed process

``<run>`` is a number that ``memory_run_id.txt`` in output_dir holds: copies of an earlier run whose folder
was removed are not those of the run that is started there later.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from spikingbrain_train.storage.checkpoint_folder import (
    incomplete_folder,
    is_iteration_folder,
    iteration_folder,
    iteration_of,
)
from spikingbrain_train.storage.durable_files import rename_durably, write_text_durably

RUN_ID_FILE = "memory_run_id.txt"

_RANK_FOLDER = re.compile(r"rank_(\d{5,})(\.copy)?")


@dataclass(frozen=True)
class MemoryShard:
    """What one rank kept of one step."""

    rank: int
    """Whose state it is."""
    iteration: int
    folder: Path


class MemoryFolder:
    """The copies of one run on this host.

    Args:
        folder: checkpoint.memory_folder.
        output_dir: of the run.
        run_id: of the run.
    """

    def __init__(self, folder: str, output_dir: str, run_id: str) -> None:
        self._of_output = folder_of(folder, output_dir)
        self._of_run = self._of_output / run_id

    def shard(self, rank: int, iteration: int, *, is_copy: bool = False) -> Path:
        """Where a rank's state of a step lies when it is complete."""
        name = f"rank_{rank:05d}.copy" if is_copy else f"rank_{rank:05d}"
        return iteration_folder(self._of_run / name, iteration)

    def shards(self) -> list[MemoryShard]:
        """Every complete one on this host, those that a rank kept for itself first; the newest step first."""
        found = []
        for of_rank in sorted(self._of_run.glob("rank_*")):
            match = _RANK_FOLDER.fullmatch(of_rank.name)
            for folder in of_rank.glob("iter_*") if match else ():
                if match and is_iteration_folder(folder):
                    found.append(MemoryShard(int(match[1]), iteration_of(folder), folder))
        return sorted(found, key=lambda shard: (-shard.iteration, shard.rank, shard.folder.parent.name))

    def begin(self, shard: Path, reused: Path | None) -> Path:
        """A folder to write a shard into, in whose place it comes; the memory of an older one is used again.

        Raises:
            OSError: it cannot be made.
        """
        begun = incomplete_folder(shard)
        shard.parent.mkdir(parents=True, exist_ok=True)
        for left in shard.parent.glob(".iter_*.incomplete"):
            shutil.rmtree(left)
        if reused is not None and reused.is_dir():
            rename_durably(reused, begun)
        else:
            begun.mkdir()
        return begun

    def remove_incomplete(self) -> None:
        """Remove what was begun and is not complete, while nobody writes."""
        for begun in list(self._of_run.glob("rank_*/.iter_*.incomplete")):
            shutil.rmtree(begun, ignore_errors=True)

    def remove_others(self) -> list[str]:
        """Remove what earlier runs in this output_dir left on this host; returns their numbers."""
        found = self._of_output.iterdir() if self._of_output.is_dir() else ()
        others = [each for each in found if each != self._of_run]
        for each in others:
            shutil.rmtree(each, ignore_errors=True)
        return sorted(each.name for each in others)

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self._of_output, ignore_errors=True)


def remove_copies(folder: str, output_dir: str) -> None:
    """Remove from this host what any run in an output_dir has left in checkpoint.memory_folder."""
    shutil.rmtree(folder_of(folder, output_dir), ignore_errors=True)


def folder_of(folder: str, output_dir: str) -> Path:
    """Where copies of all runs in an output_dir lie."""
    digest = hashlib.sha256(os.path.realpath(output_dir).encode()).hexdigest()[:16]
    return Path(folder) / f"spikingbrain-train-{digest}"


def run_id(output_dir: str) -> str:
    """The number of the run in this output_dir, made where there is none. Raises OSError."""
    path = Path(output_dir) / RUN_ID_FILE
    if path.is_file() and re.fullmatch(r"[0-9a-f]{32}", found := path.read_text(errors="replace").strip()):
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    made = uuid.uuid4().hex
    write_text_durably(path, f"{made}\n")
    return made
