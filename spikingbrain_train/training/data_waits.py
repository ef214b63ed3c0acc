"""How long steps wait for what they train on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class DataWaits:
    """Counts the host's seconds in front of batches that are not there yet.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds = 0.0

    def over(self, batches: Iterator[T]) -> Iterator[T]:
        """``batches``, timed."""
        while True:
            begin = self._clock()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._seconds += self._clock() - begin
            yield batch

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
