"""Work of one rank beside the training loop; it talks to other ranks, if at all, in a group of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundWork(Generic[T]):
    """A function that runs in a thread of its own from now on.

    A daemon: a run that ends by an error does not wait for the disk.

    Args:
        function: what to do.
        name: of the thread.
    """

    def __init__(self, function: Callable[[], T], name: str = "checkpoint") -> None:
        self._function = function
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._function())
        except BaseException as error:  # for :meth:`result`, where somebody sees it
            self._error = error

    def is_done(self) -> bool:
        """Whether it has returned or raised."""
        return not self._thread.is_alive()

    def result(self) -> T:
        """Wait for it, and return what it returned or raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._results[0]
