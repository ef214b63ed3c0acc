"""Nothing runs in silence: what takes longer than some seconds says that it still runs, and how far it is.

On a terminal that is one status line with a bar, rewritten in place. Into a file (a Slurm log, a pipe) go
whole lines: one whenever nothing else has been written for a few seconds, later in long runs one a minute.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TextIO, TypeVar

T = TypeVar("T")

_BAR_WIDTH = 20
_REFRESH_SECONDS = 0.2
_TICK_SECONDS = 0.5
_QUIET_SECONDS = 4.0
"""A log is silent for no longer than that (and a tick) ..."""
_START_SECONDS = 15 * 60.0
_QUIET_SECONDS_LATER = 60.0
"""... and for no longer than that once the process is a quarter of an hour old: logs stay readable."""


class StatusLine:
    """The lines and the status that one process writes to a stream.

    Args:
        stream: where to.
        clock: returns seconds.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream = stream
        self._clock = clock
        self._is_terminal = stream.isatty()
        self._lock = threading.Lock()
        self._status = _Status()
        self._width = 0
        self._last_refresh = float("-inf")
        self._last_write = self._begin = clock()
        self._watchers = 0
        self._stop = threading.Event()

    def now(self) -> float:
        """Seconds of this line's clock."""
        return self._clock()

    def show(self, text: str, *, since: float | None = None, share: float | None = None) -> None:
        """Set the status. A terminal shows it at most five times a second, a log only after a silence.

        Args:
            text: what is going on; empty for nothing.
            since: when it began, by :meth:`now`; None is now.
            share: how much of it is done, 0 to 1; None where that is not known.
        """
        with self._lock:
            now = self._clock()
            self._status = _Status(text, now if since is None else since, now, share)
            if self._is_terminal and text and now - self._last_refresh >= _REFRESH_SECONDS:
                self._draw(self._status.line(now, bar=True), now)

    def message(self, line: str) -> None:
        """Write a line for good, without tearing the status."""
        with self._lock:
            self._clear()
            self._write(line + "\n")
            if not self._is_terminal:
                self._last_write = self._clock()

    def tick(self) -> None:
        """Say how long it has gone on: on a terminal now, in a log if that has been silent for long."""
        with self._lock:
            if not self._status.text:
                return
            now = self._clock()
            if self._is_terminal:
                self._draw(self._status.line(now, bar=True), now)
                return
            started = now - self._begin < _START_SECONDS
            if now - self._last_write >= (_QUIET_SECONDS if started else _QUIET_SECONDS_LATER):
                self._write(self._status.line(now, bar=False) + "\n")
                self._last_write = now

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Tick every half second while the body runs, from a thread: the body may be one long call."""
        self._watchers += 1
        if self._watchers == 1:
            self._stop.clear()
            threading.Thread(target=self._watch, daemon=True).start()
        try:
            yield
        finally:
            self._watchers -= 1
            if self._watchers == 0:
                self._stop.set()
                with self._lock:
                    self._clear()

    @contextlib.contextmanager
    def activity(self, what: str, total: int | None = None, unit: str = "") -> Iterator[Activity]:
        """Show ``what`` as the status while the body runs, and the status from before after it.

        Args:
            what: "evaluating".
            total: how many ``unit`` that is, if it can be counted.
            unit: "windows"; "B" is shown as megabytes.
        """
        before = self._status
        current = Activity(self, what, total, unit)
        with self.watched():
            current.advance(0)
            try:
                yield current
            finally:
                with self._lock:
                    self._status = before
                    self._clear()

    def _watch(self) -> None:
        while not self._stop.wait(_TICK_SECONDS):
            self.tick()

    def _draw(self, text: str, now: float) -> None:
        self._last_refresh = now
        self._write("\r" + text.ljust(self._width))
        self._width = len(text)

    def _clear(self) -> None:
        if self._width:
            self._write("\r" + " " * self._width + "\r")
            self._width = 0

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


@dataclass(frozen=True)
class _Status:
    """What is going on, since when, and how far it was when somebody last said so."""

    text: str = ""
    since: float = 0.0
    said_at: float = 0.0
    share: float | None = None

    def line(self, now: float, *, bar: bool) -> str:
        elapsed, parts = now - self.since, [self.text]
        if bar and self.share is not None:
            filled = round(_BAR_WIDTH * self.share)
            parts.insert(0, f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}]")
        if elapsed >= 1:
            parts.append(format_duration(elapsed))
        left = (self.said_at - self.since) / self.share - elapsed if self.share else 0.0
        return " ".join(parts) + (f", about {format_duration(left)} left" if left >= 1 else "")


class Activity:
    """What a process is doing, and how far it is. Made by :meth:`StatusLine.activity`."""

    def __init__(self, status: StatusLine | None, what: str, total: int | None, unit: str) -> None:
        self._status = status
        self._what, self._total, self._unit = what, total, unit
        self._done = 0
        self._begin = 0.0 if status is None else status.now()

    def advance(self, amount: int = 1) -> None:
        """``amount`` more is done."""
        self._done += amount
        if self._status is not None:
            share = min(1.0, self._done / self._total) if self._total else None
            self._status.show(f"{self._what}{self._count()} ...", since=self._begin, share=share)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """``items``, each of which counts as done when the next one is asked for."""
        for item in items:
            yield item
            self.advance()

    def _count(self) -> str:
        if self._total is None:
            return f" {self._done} {self._unit}" if self._done and self._unit else ""
        if self._unit == "B":
            return f" {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB"
        return f" {self._done} of {self._total} {self._unit}"


@contextlib.contextmanager
def activity(
    what: str, total: int | None = None, unit: str = "", *, shown: bool = True
) -> Iterator[Activity]:
    """:meth:`StatusLine.activity` on standard error, for commands; ``shown=False`` says nothing."""
    if not shown:
        yield Activity(None, what, total, unit)
        return
    with _on_standard_error().activity(what, total, unit) as current:
        yield current


def _on_standard_error() -> StatusLine:
    """One for the whole process, so that one activity after the other, each short, is no silence either."""
    if not _STANDARD_ERROR or _STANDARD_ERROR[0].stream is not sys.stderr:
        _STANDARD_ERROR[:] = [StatusLine(sys.stderr)]
    return _STANDARD_ERROR[0]


_STANDARD_ERROR: list[StatusLine] = []


def format_duration(seconds: float) -> str:
    """``45s``, ``3m 05s``, ``2h 07m`` or ``3d 04h``: the two largest units, rounded to the smaller."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d {hours % 24:02d}h"
