"""What a conversion will take of this machine: processes, memory, disk and time."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from isal import isal_zlib

from spikingbrain_train.conversion.output_folder import Leftover
from spikingbrain_train.conversion.parts import Parts
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.launch import available_cores, memory_limit
from spikingbrain_train.reporting.activity import format_duration

_WORTH_A_PROCESS = 2 * 10**9
"""Bytes. A process imports torch for some seconds first."""
_MOST_WORKERS = 8
"""Beyond, disks are what is waited for; whoever has a faster one asks for more."""
_ASKED_PER_CORE = 4
_PROCESS_BYTES = 350 * 10**6
"""Of a process with torch, before it reads anything."""
_COPIES = 3
"""Of a piece that does not come in blocks, at the most at once: as read, as laid out, as copied for it."""
_PASSES = 20
"""What is done with a byte costs about that many checksums of it: 2.3 s a GB, where one runs at 10 GB/s."""
_SAMPLE_BYTES = 64 << 20
_START_SECONDS = 5.0
"""Until a worker process has imported torch."""


def process_bytes(parts: Parts) -> int:
    """Memory of one process at its peak, about."""
    return _PROCESS_BYTES + _COPIES * parts.largest_piece


def choose_workers(asked: int | None, parts: Parts) -> int:
    """How many processes work.

    Args:
        asked: so many; None takes one a core, as far as their memory and the parts go.
        parts: the work.

    Raises:
        ConfigurationError: that number makes no sense here.
    """
    cores = available_cores()
    if asked is None:
        limit = memory_limit()
        fitting = _MOST_WORKERS if limit is None else max(1, limit // 2 // process_bytes(parts))
        worth = max(1, sum(parts.sizes) // _WORTH_A_PROCESS)
        return min(cores, fitting, worth, len(parts.sizes), _MOST_WORKERS)
    if asked < 1:
        raise ConfigurationError(f"--workers is {asked}: give at least 1")
    most = max(_MOST_WORKERS, _ASKED_PER_CORE * cores)
    if asked > most:
        raise ConfigurationError(f"--workers is {asked}: on {cores} cores give at most {most}")
    return max(1, min(asked, len(parts.sizes)))


@dataclass(frozen=True)
class Estimate:
    """What a conversion is expected to take."""

    written: int
    """Bytes of the result."""
    kept: int
    """Bytes of those that a killed call has left."""
    read: int
    """Bytes of the source."""
    free: int
    """Bytes on the disk of the result."""
    parts: int
    part_bytes: int
    """About how many a part has."""
    workers: int
    memory: int
    """Bytes of each process."""
    seconds: float
    """From its first byte on, without the start of the command."""

    def lines(self) -> list[str]:
        """For a person."""
        kept = f", of which a killed call has left {self.kept / 1e9:.2f} GB" if self.kept else ""
        processes = "1 process" if self.workers == 1 else f"{self.workers} processes"
        each = "" if self.workers == 1 else " each"
        return [
            f"plan: {self.parts} parts of about {self.part_bytes / 1e6:.0f} MB, {processes}; a kill costs at "
            f"most one part a process, the same command goes on",
            f"disk: reads {self.read / 1e9:.2f} GB, writes {self.written / 1e9:.2f} GB{kept}; "
            f"{self.free / 1e9:.1f} GB are free",
            f"memory: about {self.memory / 1e9:.1f} GB{each}",
            f"time: about {format_duration(max(self.seconds, 1))} from its first byte on, as fast as disk "
            "and cores are now",
        ]


def estimate(parts: Parts, read: int, workers: int, output: Path, leftover: Leftover) -> Estimate:
    """Measure the disk and a core for a moment, and extrapolate.

    Args:
        parts: the work.
        read: bytes of the source.
        workers: processes.
        output: the future folder, on whose disk a nameless file is written.
        leftover: what is there already.

    Raises:
        OSError: the disk cannot be written.
    """
    written = sum(parts.sizes)
    parent = next(folder for folder in output.resolve().parents if folder.exists())
    todo = max(written - leftover.bytes, 0)
    state = os.statvfs(parent)
    of_disk, of_core = _write_speed(parent, min(_SAMPLE_BYTES, max(todo, 1))), _checksum_speed()
    start = _START_SECONDS if workers > 1 else 0.0
    moved = todo + (read * todo / written if written else 0)  # the same disk, as far as anybody knows
    return Estimate(
        written=written,
        kept=leftover.bytes,
        read=read,
        free=state.f_bavail * state.f_frsize,
        parts=len(parts.sizes),
        part_bytes=parts.part_bytes,
        workers=workers,
        memory=process_bytes(parts),
        seconds=start + max(moved / of_disk, _PASSES * todo / of_core / workers),
    )


def _write_speed(folder: Path, sample: int) -> float:
    """Bytes a second that reach the disk; the file has no name and is gone at once."""
    block = os.urandom(min(1 << 20, sample))
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        begin = time.perf_counter()
        written = 0
        while written < sample:
            written += file.write(block)
        os.fsync(file.fileno())
    return written / max(time.perf_counter() - begin, 1e-6)


def _checksum_speed() -> float:
    block = bytes(8 << 20)
    begin = time.perf_counter()
    isal_zlib.crc32(block)
    return len(block) / max(time.perf_counter() - begin, 1e-6)
