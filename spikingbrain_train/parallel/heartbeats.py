"""Who is missing when ranks wait for each other in vain.

A collective that fails says that some connection was quiet for too long, not whose fault that is: all ranks
are in the same step, and those that wait for a rank that waits look alike. So every rank has a thread that
writes a growing number to the launcher's store. A process that is stopped, dead, or cut off does not.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

import torch

from spikingbrain_train.config.command_line import USER_ERROR
from spikingbrain_train.config.errors import PlatformError
from spikingbrain_train.parallel.process_groups import ProcessGroups, restart_prefix

_LONGEST_INTERVAL, _INTERVALS_PER_TIMEOUT = 5.0, 12
_PATIENCE = 2.5
"""Intervals in which a living rank writes at least once, however busy its machine."""
_STORE_SECONDS = 20.0
_BROKEN = r"gloo|connection (closed|reset) by peer|broken pipe"


class Heartbeats:
    """Writes this rank's heartbeat while it is entered, and turns a failed collective into a sentence.

    Args:
        groups: process groups; a world of one rank has nobody to miss.
        timeout_minutes: what the groups were formed with.
    """

    def __init__(self, groups: ProcessGroups, timeout_minutes: float) -> None:
        self.groups = groups
        self.timeout_minutes = timeout_minutes
        self.interval = min(_LONGEST_INTERVAL, timeout_minutes * 60 / _INTERVALS_PER_TIMEOUT)
        self._iteration: Callable[[], int] = lambda: 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def follow(self, iteration: Callable[[], int]) -> None:
        """Say from now on which step this rank is at: steps that are done."""
        self._iteration = iteration

    def __enter__(self) -> Heartbeats:
        if self.groups.world_size > 1 and os.environ.get("MASTER_PORT"):
            self._thread = threading.Thread(target=self._beat, name="heartbeats", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises:
        PlatformError: ``error`` is a failed collective; on one rank, the others end with USER_ERROR.
        """
        try:
            failed = failed_collective(error)
            if failed is not None and self._thread is not None:
                self._explain(failed)
        finally:
            self._ended.set()

    def _connect(self) -> torch.distributed.Store:
        # A connection of its own: on that of the process group, a waiting rank would hold this thread up.
        store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=_STORE_SECONDS),
        )
        return torch.distributed.PrefixStore(f"heartbeats/{restart_prefix()}", store)

    def _beat(self) -> None:
        try:
            store, beats = self._connect(), 0
            while not self._ended.is_set():
                beats += 1
                store.set(str(self.groups.rank), f"{beats} {self._iteration()}")
                self._ended.wait(self.interval)
        except Exception:  # without a store there is no answer, which is what _explain says then
            return

    def _read(self, store: torch.distributed.Store) -> dict[int, tuple[int, int]]:
        """Rank -> (beats, steps done) of those that have ever written."""
        found = {}
        for rank in range(self.groups.world_size):
            if store.check([str(rank)]):
                beats, iteration = store.get(str(rank)).decode().split()
                found[rank] = (int(beats), int(iteration))
        return found

    def _explain(self, error: BaseException) -> None:
        waited = (
            f"cluster.timeout_minutes={self.timeout_minutes:g}"
            if "imed out" in str(error)
            else "the connection to it broke"
        )
        done = self._iteration()
        try:
            store = self._connect()
            before = self._read(store)
            time.sleep(_PATIENCE * self.interval)
            after = self._read(store)
        except Exception:
            raise PlatformError(
                f"the rendezvous store of {os.environ['MASTER_ADDR']} does not answer after iteration {done} "
                f"({waited}): its node or rank 0 has ended, is stopped or cannot be reached; look there, and "
                "start again to go on from the newest checkpoint."
            ) from error
        everyone = range(self.groups.world_size)
        missing = [
            rank for rank in everyone if rank not in after or after[rank][0] == before.get(rank, (0,))[0]
        ]
        present = [rank for rank in everyone if rank not in missing]
        if self.groups.rank != min(present, default=self.groups.rank):
            raise SystemExit(USER_ERROR) from None  # one rank speaks for all
        if missing:
            names = f"rank{'s' if len(missing) > 1 else ''} " + ", ".join(map(str, missing[:8]))
            more = " ..." if len(missing) > 8 else ""
            raise PlatformError(
                f"{names}{more} of {self.groups.world_size} did not answer in the step after iteration "
                f"{done} ({waited}): stopped, ended, or cut off; look at its last words and its node, and "
                "start again to go on from the newest checkpoint."
            ) from error
        last = min(after, key=lambda rank: after[rank][1])
        raise PlatformError(
            f"ranks waited for each other in the step after iteration {done} ({waited}), although all are "
            f"alive (rank {last} has done {after[last][1]}); raise cluster.timeout_minutes if reading data, "
            "evaluating or saving can take longer than that."
        ) from error


def failed_collective(error: BaseException | None) -> RuntimeError | None:
    """``error``, or what it came from, if that is a collective that timed out or lost its connection."""
    while error is not None:
        if isinstance(error, torch.distributed.DistBackendError):
            return error
        if isinstance(error, RuntimeError) and re.search(_BROKEN, str(error), re.IGNORECASE):
            return error
        error = error.__cause__
    return None
