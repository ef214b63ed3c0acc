"""A conversion's work: planned, then estimated, found done by a call that was killed, or done."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from spikingbrain_train.conversion.estimate import choose_workers, estimate
from spikingbrain_train.conversion.output_folder import (
    Leftover,
    Workspace,
    check_output_folder,
    clear_leftover,
    resumable_folder,
)
from spikingbrain_train.conversion.part_workers import write_parts
from spikingbrain_train.conversion.parts import Parts, Record


class Report(Protocol):
    """What is told of a conversion before it begins."""

    dry_run: bool
    notes: list[str]
    needs: list[str]


@dataclass(frozen=True)
class Work:
    """The parts of a conversion, and the folder that they make."""

    parts: Parts
    output: Path
    key: str
    """What its bytes depend on: its :func:`~spikingbrain_train.conversion.work_key.work_key`."""
    reads: int
    """Bytes of the source."""
    workers: int
    leftover: Leftover
    progress: bool
    """Whether standard error says how far it is."""

    @classmethod
    def plan(
        cls,
        parts: Parts,
        output: Path,
        key: str,
        *,
        source: Path,
        reads: int,
        marker: str,
        workers: int | None,
        overwrite: bool,
        dry_run: bool,
        progress: bool,
    ) -> Work:
        """Choose the number of processes and check the folder, before any work.

        Args:
            parts: what is to be written.
            output: the folder to be made.
            key: what its bytes depend on.
            source: the folder that is read.
            reads: bytes of it.
            marker: file that only a folder made by the same command has.
            workers: processes that were asked for; None chooses.
            overwrite: whether an existing folder with content may be replaced.
            dry_run: remove nothing.
            progress: say on standard error how far it is.

        Raises:
            CheckpointError: the folder cannot or must not be written.
            ConfigurationError: that number of processes makes no sense here.
        """
        chosen = choose_workers(workers, parts)
        leftover = check_output_folder(
            output,
            source=source,
            overwrite=overwrite,
            marker=marker,
            needed_bytes=sum(parts.sizes),
            key=key,
            dry_run=dry_run,
        )
        return cls(parts, output, key, reads, chosen, leftover, progress)

    def is_over(self, report: Report) -> bool:
        """Whether nothing is to be written: a dry run, whose needs the report gets, or all is there."""
        if report.dry_run:
            needs = estimate(self.parts, self.reads, self.workers, self.output, self.leftover)
            report.needs = needs.lines()
            return True
        if self.leftover.is_complete:
            clear_leftover(self.output)
            report.notes.append("a killed call had written all of it; nothing was left to do")
        return self.leftover.is_complete

    def begun(self) -> AbstractContextManager[Workspace]:
        """The future output folder, which takes its place when the block ends.

        Raises:
            CheckpointError: as :func:`resumable_folder`.
        """
        return resumable_folder(self.output, self.key, progress=self.progress)

    def write(self, workspace: Workspace, folder: Path, what: str) -> list[Record]:
        """Write all parts into ``folder``, as :func:`write_parts` tells."""
        return write_parts(
            self.parts, workspace, folder, what=what, workers=self.workers, progress=self.progress
        )
