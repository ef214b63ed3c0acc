"""Where the time of a rank's passes goes: its own computing, and waiting for other ranks."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch

from spikingbrain_train.runtime.collective_waits import marked_collectives

_SCHEDULER = "/proc/thread-self/schedstat"
"""Linux: nanoseconds on a core, nanoseconds waiting for one, and how often it got one."""


@dataclass(frozen=True)
class PassTime:
    """The forward and backward pass of one step on this rank, in seconds."""

    computing: float
    """Without waiting for other ranks. Reading data is in it, and whatever else holds this rank up."""
    waiting: float
    """In collectives: until the others are there, and while data is sent."""


class _Mark(Protocol):
    """A moment, on the host's clock or in the order of the device's work."""

    def seconds_until(self, later: _Mark) -> float:
        """Waits for nothing: the work between them has to be done."""
        ...


class _HostMark:
    """By a clock that may stand still while this thread is ready to run and others have the cores."""

    def __init__(self, *, counts_queueing: bool) -> None:
        self._at = time.perf_counter() - (0.0 if counts_queueing else _queued())

    def seconds_until(self, later: _Mark) -> float:
        assert isinstance(later, _HostMark)
        return later._at - self._at


def _queued() -> float:
    """Seconds that this thread has waited for a core so far; 0 where the system does not count them."""
    # Twice each collective: what pathlib and a text file cost showed in small steps.
    try:
        file = os.open(_SCHEDULER, os.O_RDONLY)
        try:
            return int(os.read(file, 100).split()[1]) / 1e9
        finally:
            os.close(file)
    except (OSError, IndexError):
        return 0.0


class _StreamMark:
    """An event on the current stream: recording one makes nobody wait."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def seconds_until(self, later: _Mark) -> float:
        assert isinstance(later, _StreamMark)
        return self._event.elapsed_time(later._event) / 1e3


@dataclass
class _Pass:
    begin: _Mark
    waits: list[tuple[_Mark, _Mark]]
    end: _Mark | None = None


class PassTimer:
    """Times passes by marks, which are read when somebody asks.

    Args:
        device: of this rank.
        shares_cores: whether its host's ranks leave no core free. Who has to queue for one there is a matter
            of chance, most of a pass, and no rank's fault: it is left out. Elsewhere whoever takes a rank's
            core away slows it.
    """

    def __init__(self, device: torch.device, *, shares_cores: bool = False) -> None:
        self._on_stream = device.type != "cpu"
        self._counts_queueing = not shares_cores
        self._passes: list[_Pass] = []
        self._marking = ExitStack()

    def begin(self) -> None:
        """A pass begins."""
        current = _Pass(self._now(), [])
        self._passes.append(current)

        def wait() -> object:
            since = self._now()
            return lambda: current.waits.append((since, self._now()))

        self._marking.enter_context(marked_collectives(wait, on_stream=self._on_stream))  # type: ignore[arg-type]

    def end(self) -> None:
        """It ends; nothing happens where none is under way."""
        self._marking.close()
        if self._passes and self._passes[-1].end is None:
            self._passes[-1].end = self._now()

    def take(self) -> list[PassTime]:
        """The passes since the last call. The device has to be done with them, as behind a read loss."""
        found = [
            PassTime(one.begin.seconds_until(one.end) - waiting, waiting)
            for one in self._passes
            if one.end is not None
            for waiting in [sum(since.seconds_until(until) for since, until in one.waits)]
        ]
        self._passes = []
        return found

    def _now(self) -> _Mark:
        return _StreamMark() if self._on_stream else _HostMark(counts_queueing=self._counts_queueing)
