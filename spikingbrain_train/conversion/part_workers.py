"""Writes the parts of a conversion: in this process, or in several that share them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path
from typing import Any, TypeAlias

import torch

from spikingbrain_train.conversion.output_folder import StoppedEarly, Workspace
from spikingbrain_train.conversion.parts import Advance, Parts, Record, is_intact, one_thread
from spikingbrain_train.reporting.activity import Activity, activity
from spikingbrain_train.storage.temporary_folder import helping

_POLL_SECONDS = 0.2
_ENTRY = "part {}"
_Result: TypeAlias = "Future[tuple[int, Record | None]]"


def write_parts(
    parts: Parts, workspace: Workspace, folder: Path, *, what: str, workers: int, progress: bool
) -> list[Record]:
    """Write all parts, but for those that the journal lists and that are still what it says.

    Args:
        parts: the work.
        workspace: its journal says what is done, and is told.
        folder: where parts are written: the new folder, or one in it.
        what: "importing", for the progress line.
        workers: processes; 1 is this one.
        progress: say on standard error how far it is.

    Returns:
        The record of every part, in their order.

    Raises:
        CheckpointError: the source is damaged.
        StoppedEarly: a worker process was killed.
        OSError: the disk is full, or cannot be written.
    """
    found = {
        number: record
        for number in range(len(parts.sizes))
        if (record := workspace.journal.entries.get(_ENTRY.format(number))) is not None
    }
    records: dict[int, Record] = {}
    missing = [number for number in range(len(parts.sizes)) if number not in found]
    workers = min(workers, len(parts.sizes))
    with _helpers(parts, workspace, folder, workers) as helpers:
        if found:
            total = sum(parts.sizes[number] for number in found)
            with activity("checking what a killed call has written", total, "B", shown=progress) as done:
                for number, record in helpers.run(list(found.items()), done):
                    if record is None:
                        missing.append(number)
                    else:
                        records[number] = found[number]
        total = sum(parts.sizes[number] for number in missing)
        with activity(what, total, "B", shown=progress) as done:
            for number, record in helpers.run([(number, None) for number in sorted(missing)], done):
                assert record is not None
                records[number] = workspace.journal.add(_ENTRY.format(number), record)
    return [records[number] for number in range(len(parts.sizes))]


def _do(
    parts: Parts, folder: Path, number: int, found: Record | None, advance: Advance
) -> tuple[int, Record | None]:
    """Write a part or, where it is found, check it: then None says that it is not what it was."""
    if found is None:
        return number, parts.write(number, folder, advance)
    intact = is_intact(found, folder)
    advance(parts.sizes[number])
    return number, found if intact else None


class _ThisProcess:
    """Works alone."""

    def __init__(self, parts: Parts, folder: Path) -> None:
        self.parts, self.folder = parts, folder

    def run(
        self, tasks: list[tuple[int, Record | None]], done: Activity
    ) -> Iterator[tuple[int, Record | None]]:
        for number, found in tasks:
            with one_thread():
                result = _do(self.parts, self.folder, number, found, done.advance)
            yield result


class _Processes:
    """Shares it with worker processes, which end with this one, however it ends.

    They take the first parts; this process takes the last ones, and begins while they import torch.
    """

    def __init__(self, parts: Parts, workspace: Path, folder: Path, workers: int) -> None:
        self.parts, self.folder = parts, folder
        # Not fork: torch and the progress line have threads, whose locks a forked child would inherit.
        context = multiprocessing.get_context("spawn")
        self.shared = _Shared(context.Value("q", 0), context.Event())
        self.executor = ProcessPoolExecutor(
            workers - 1, context, initializer=_start, initargs=(parts, workspace, folder, self.shared)
        )
        self.workers = workers
        self.thread = ThreadPoolExecutor(1)

    def run(
        self, tasks: list[tuple[int, Record | None]], done: Activity
    ) -> Iterator[tuple[int, Record | None]]:
        said = self.shared.bytes.value
        waiting, given = deque(tasks), set[_Result]()
        own: _Result | None = None
        try:
            while waiting or given or own:
                if waiting and own is None:
                    own = self.thread.submit(self._do_here, *waiting.pop())
                # Never more than it begins at once: a pool of which a process was killed does not end the
                # others where one of its tasks had been cancelled (CPython 3.11).
                while waiting and len(given) < self.workers:
                    given.add(self.executor.submit(_work, *waiting.popleft()))
                ended, _ = wait(given | ({own} if own else set()), _POLL_SECONDS, FIRST_COMPLETED)
                now = self.shared.bytes.value
                done.advance(now - said)
                said = now
                for future in ended:
                    yield future.result()
                given -= ended
                own = None if own in ended else own
        except BrokenProcessPool as error:
            raise StoppedEarly(
                "a process of the conversion was killed, probably for want of memory; run the same command "
                "again to go on where it stopped, with fewer --workers"
            ) from error

    def _do_here(self, number: int, found: Record | None) -> tuple[int, Record | None]:
        with one_thread():
            return _do(self.parts, self.folder, number, found, self.shared.advance)

    def close(self) -> None:
        self.shared.stop.set()
        self.executor.shutdown(wait=True, cancel_futures=True)
        self.thread.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _helpers(
    parts: Parts, workspace: Workspace, folder: Path, workers: int
) -> Iterator[_ThisProcess | _Processes]:
    if workers <= 1:
        yield _ThisProcess(parts, folder)
        return
    processes = _Processes(parts, workspace.journal.path.parent, folder, workers)
    try:
        yield processes
    finally:
        processes.close()


@dataclass(frozen=True)
class _Shared:
    """What this process and its workers tell each other while they work."""

    bytes: Any
    """How many are done, over all workers."""
    stop: Any
    """Set when nobody waits for results any more."""

    def advance(self, amount: int) -> None:
        """Count bytes that are done. Raises _Stopped when nobody waits for them."""
        if self.stop.is_set():
            raise _Stopped
        with self.bytes.get_lock():
            self.bytes.value += amount


class _Stopped(Exception):
    """Where parts are written: nobody waits for the result."""


_state: tuple[Parts, Path, _Shared]
"""Set once in each worker process."""


def _start(parts: Parts, workspace: Path, folder: Path, shared: _Shared) -> None:
    """Begin a worker process."""
    global _state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops workers
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    lock = helping(workspace)
    lock.__enter__()  # until this process ends
    _open_for_life.append(lock)
    if not parent.is_alive():  # killed before the lock was there: another call may have the folder
        os._exit(1)
    torch.set_num_threads(1)
    _state = (parts, folder, shared)


_open_for_life: list[Any] = []


def _end_with(parent: int) -> None:
    """Nothing may be written on when the parent was killed: somebody may go on in its folder."""
    wait_for_end([parent])
    os._exit(1)


def _work(number: int, found: Record | None) -> tuple[int, Record | None]:
    parts, folder, shared = _state
    return _do(parts, folder, number, found, shared.advance)
