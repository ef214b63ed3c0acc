"""What passes between the start of a process and its first step, and what it goes into."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from spikingbrain_train.reporting.activity import format_duration

_IMPORTED = time.monotonic()
REST = "the rest"


def process_began() -> float:
    """When this process began, by ``time.monotonic()``: as Linux says, else when this module was imported."""
    try:
        # Behind the command's name, which may hold blanks, the 20th field counts clock ticks since the boot.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return _IMPORTED
    return min(_IMPORTED, time.monotonic() - age)


class StartTimes:
    """Seconds of the parts of a start; parts within parts belong to those around them.

    Args:
        began: when the process did, by ``clock``.
        clock: returns seconds.
    """

    def __init__(self, began: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.began = began
        self.total: float | None = None
        """None until :meth:`finish`."""
        self._clock = clock
        self._parts: dict[str, float] = {}
        self._depth = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time of this block belongs to ``name``; without effect once the start is finished."""
        self._depth += 1
        begin = self._clock()
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.add(name, self._clock() - begin)

    def add(self, name: str, seconds: float) -> None:
        """So many seconds more went into ``name``."""
        if self.total is None:
            self._parts[name] = self._parts.get(name, 0.0) + seconds

    def until_now(self) -> float:
        """Seconds since the process began."""
        return self._clock() - self.began

    def finish(self) -> None:
        """The first step is done."""
        if self.total is None:
            self.total = self.until_now()

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by part, the longest first; what none is known of at the end. They sum up to the total."""
        assert self.total is not None, "the first step is not done"
        found = dict(sorted(self._parts.items(), key=lambda part: -part[1]))
        rest = self.total - sum(found.values())
        return found | {REST: rest} if rest > 0 else found

    def describe(self) -> str:
        """``48s after the start: 20.1 s imports and checks, 9.8 s first step, ..., 1.2 s the rest``."""
        assert self.total is not None
        shown = {name: seconds for name, seconds in self.parts.items() if seconds >= 0.01 * self.total}
        hidden = self.total - sum(shown.values()) + shown.pop(REST, 0.0)
        if hidden >= 0.05:
            shown[REST] = hidden
        return f"{format_duration(self.total)} after the start: " + ", ".join(
            f"{_seconds(seconds)} {name}" for name, seconds in shown.items()
        )


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else format_duration(seconds)
