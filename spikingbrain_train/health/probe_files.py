"""Files that a check leaves in the output folder for a moment, and not longer than it lives."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

PREFIX = ".health-check-"
_ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a check: of a cancelled job and of a closed terminal. Ctrl-C is an exception by itself."""
_STALE_SECONDS = 3600.0


@contextmanager
def removed_behind(path: Path) -> Iterator[None]:
    """Remove a file when the block ends, also where a signal ends the process in it."""

    def end(number: int, _frame: FrameType | None) -> None:
        with suppress(OSError):
            path.unlink()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    taken = []
    if threading.current_thread() is threading.main_thread():
        taken = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def remove_stale(token: Path) -> None:
    """Remove what checks have left that were killed, by the clock of the file system: ``token`` is new."""
    with suppress(OSError):
        now = token.stat().st_mtime
        for path in token.parent.glob(f"{PREFIX}*"):
            with suppress(OSError):  # somebody else's
                if now - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()
