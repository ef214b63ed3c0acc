"""Who is missing when ranks wait for each other in vain.

A collective that fails says that some connection was quiet for too long, not whose fault that is: all ranks
are in the same step, and those that wait for a rank that waits look alike. So every rank has a thread that
writes a growing number to the launcher's store, and what the rank does. A process that is stopped, dead, or
cut off does not, and of one that hangs its stack tells.

Under NCCL no exception tells Python that a collective has timed out: NCCL's watchdog ends the process. So the
thread also reads what the next rank writes, and says before that time that it has fallen silent.
"""

from __future__ import annotations

import atexit
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType

import torch

from spikingbrain_train.config.command_line import USER_ERROR
from spikingbrain_train.errors import PlatformError
from spikingbrain_train.parallel.last_signs import Sign
from spikingbrain_train.parallel.process_groups import ProcessGroups, restart_prefix

_LONGEST_INTERVAL, _INTERVALS_PER_TIMEOUT = 4.0, 12
_PATIENCE = 2.5
"""Intervals in which a living rank writes at least once, however busy its machine."""
_STORE_SECONDS, _REACH_SECONDS, _PROBE_SECONDS = 20.0, 5.0, 1.0
_SILENT_SHARE = 0.75
"""Of the timeout, after which a silent rank is named: a collective may have been queued a step before."""
_LEFT = -1
"""In place of a number of beats: the rank has ended as it should."""
_SPOKEN = "spoken"
_NAMED = 8
"""Ranks of which a sentence speaks."""
_LOST = r"\bgloo/\S+\.(cc|h):\d+|connection (was )?(closed|reset)|closed by remote peer|broken pipe"
_LOST_NCCL = rf"{_LOST}|ncclRemoteError|remote error|timeout|(?<!connection )timed out"
"""Not NCCL's other failures, such as no memory, no route, or no driver, which it explains itself."""


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
        self._ends_well = False
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
        """Name the rank that has fallen silent, if that is why a collective failed.

        Raises:
            PlatformError: ``error`` is a failed collective; on one rank, the others end with USER_ERROR.
        """
        try:
            failed = failed_collective(error)
            if failed is not None and self._thread is not None:
                self._explain(failed)
        finally:
            self._ends_well = error is None
            self._ended.set()
        if self._ends_well and self._thread is not None:
            self._thread.join(self.interval)  # it takes its leave of the others

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
        store, sign, beats = None, Sign.of_this_process(), 0
        next_rank = _Watched((self.groups.rank + 1) % self.groups.world_size)
        while not self._ended.is_set():
            beats += 1
            try:
                store = store or self._connect()
                sign = sign.next(beats, self._iteration())
                store.set(str(self.groups.rank), sign.write())
                self._watch(store, next_rank)
            except Exception:  # the next beat tries again; a store that stays away is what _explain speaks of
                store = None
            self._ended.wait(self.interval)
        if store is not None and self._ends_well:
            with suppress(Exception):
                store.set(str(self.groups.rank), sign.next(_LEFT, self._iteration()).write())

    def _watch(self, store: torch.distributed.Store, watched: _Watched) -> None:
        """Say once that the next rank has been silent for most of the timeout.

        One rank each, so that the store has few requests to answer. Of neighbours that fall silent together,
        such as the ranks of a node, the first is named.
        """
        key = str(watched.rank)
        written = store.get(key) if store.check([key]) else None
        sign = None if written is None else Sign.read(written)
        silent = watched.beats_without_news(sign)
        seconds = silent * self.interval
        if seconds < _SILENT_SHARE * self.timeout_minutes * 60 or watched.named:
            return
        watched.named = True
        sys.stderr.write(
            f"warning: rank {watched.rank} of {self.groups.world_size} has not answered for {seconds:.0f} s "
            f"in the step after iteration {self._iteration()}: stopped, ended, or cut off; look at its last "
            f"words and its node. cluster.timeout_minutes={self.timeout_minutes:g} will end the run; start "
            "it again then to go on from the newest checkpoint.\n"
            + ("" if sign is None else f"{sign.describe(watched.rank)}\n")
        )
        sys.stderr.flush()

    def _read(self, store: torch.distributed.Store) -> dict[int, Sign]:
        """By rank what those have written that ever did."""
        ranks = range(self.groups.world_size)
        return {rank: Sign.read(store.get(str(rank))) for rank in ranks if store.check([str(rank)])}

    def _ask_store(self) -> tuple[dict[int, Sign], dict[int, Sign], bool]:
        """What the ranks say now and some beats later, and whether this one is the first to speak of it.

        One rank speaks for all: the first, since the launcher ends the others as soon as one has ended.

        Raises:
            OSError: the store does not answer; torch would try for longer than launchers wait for a process.
        """
        answers: list[tuple[dict[int, Sign], dict[int, Sign], bool]] = []

        def ask() -> None:
            with suppress(Exception):
                store = self._connect()
                before = self._read(store)
                time.sleep(_PATIENCE * self.interval)
                answers.append((before, self._read(store), store.add(_SPOKEN, 1) == 1))

        _reach_store()
        asking = threading.Thread(target=ask, name="last heartbeats", daemon=True)
        asking.start()
        latest = time.monotonic() + _STORE_SECONDS
        while asking.is_alive() and time.monotonic() < latest:
            asking.join(_PROBE_SECONDS)
            if asking.is_alive():
                _reach_store()  # a store whose process was about to end has let the first call through
        if not answers:
            raise TimeoutError("the rendezvous store does not answer")
        return answers[0]

    def _explain(self, error: BaseException) -> None:
        waited = (
            f"cluster.timeout_minutes={self.timeout_minutes:g}"
            if re.search("timed ?out|timeout", str(error), re.IGNORECASE)
            else "a connection broke"
        )
        done = self._iteration()
        try:
            before, after, is_first = self._ask_store()
        except OSError:
            raise PlatformError(
                f"the rendezvous store of {os.environ['MASTER_ADDR']} does not answer after iteration {done} "
                f"({waited}): its node or rank 0 has ended, is stopped or cannot be reached; look there, and "
                "start again to go on from the newest checkpoint."
            ) from error
        missing = [
            rank
            for rank in range(self.groups.world_size)
            if rank not in after or after[rank].beats in (_LEFT, before[rank].beats if rank in before else 0)
        ]
        states = {rank: after[rank].state(rank) for rank in missing[:_NAMED] if rank in after}
        for rank in missing:
            if rank in after:  # when this process has spoken: the launcher ends it as soon as one has ended
                atexit.register(after[rank].end, rank)
        if not is_first:
            raise SystemExit(USER_ERROR) from None
        if missing:
            self._show(missing, after)
            why = next(filter(None, states.values()), "stopped, ended, or cut off")
            raise PlatformError(
                f"{_named(missing)} of {self.groups.world_size} did not answer in the step after iteration "
                f"{done} ({waited}): {why}; look at its last words and its node, and "
                "start again to go on from the newest checkpoint."
            ) from error
        hanging = _hanging(before, after)
        self._show(hanging, before)
        last = min(after, key=lambda rank: after[rank].iteration)
        where = (
            f"{_named(hanging)} did not wait for the others; look at the stack above, and raise"
            if hanging
            else f"rank {last} has done {after[last].iteration}; raise"
        )
        raise PlatformError(
            f"ranks waited for each other in the step after iteration {done} ({waited}), although all are "
            f"alive: {where} cluster.timeout_minutes if reading data, "
            "evaluating or saving can take longer than that."
        ) from error

    def _show(self, ranks: list[int], signs: dict[int, Sign]) -> None:
        """Print what some ranks have last said of themselves."""
        shown = [signs[rank].describe(rank) for rank in ranks[:_NAMED] if rank in signs]
        sys.stderr.write("".join(f"{each}\n" for each in shown))
        sys.stderr.flush()


def _reach_store() -> None:
    """Raise OSError where nobody listens."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    socket.create_connection(address, _REACH_SECONDS).close()


def _hanging(before: dict[int, Sign], after: dict[int, Sign]) -> list[int]:
    """Of living ranks those that the others wait for; none where that cannot be told.

    Args:
        before: what they said when a collective had failed.
        after: and some time later: who was on its way has moved on.
    """
    busy = [rank for rank, sign in sorted(before.items()) if not sign.waits_for_others]
    stays = [rank for rank in busy if after[rank].iteration == before[rank].iteration]
    return stays if len(stays) < len(before) else []


def _named(ranks: list[int]) -> str:
    names = f"rank{'s' if len(ranks) > 1 else ''} " + ", ".join(map(str, ranks[:_NAMED]))
    return names + (" ..." if len(ranks) > _NAMED else "")


class _Watched:
    """What is known of another rank, counted in own beats: a machine that sleeps as a whole misses nobody."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.named = False
        """Whether its present silence has been spoken of."""
        self._last = 0
        self._silent = 0

    def beats_without_news(self, sign: Sign | None) -> int:
        """Take in what it has written last, if ever; returns for how many beats that has been the same."""
        beats = 0 if sign is None else sign.beats
        if beats != self._last or beats == _LEFT:
            self._last, self._silent, self.named = beats, 0, False
        else:
            self._silent += 1
        return self._silent


def failed_collective(error: BaseException | None) -> RuntimeError | None:
    """``error``, or what it came from, if that is a collective that timed out or lost its connection."""
    while error is not None:
        if isinstance(error, RuntimeError):
            is_nccl = isinstance(error, torch.distributed.DistBackendError)
            if re.search(_LOST_NCCL if is_nccl else _LOST, str(error), re.IGNORECASE):
                return error
        error = error.__cause__
    return None
