"""Signals that come while a command starts.

Until a rank's interpreter stands, a signal would end it with a traceback, or be lost between fork and exec.
So ranks are started with these signals blocked, which they inherit, and a command unblocks them first of all.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable

from spikingbrain_train.config.command_line import interrupts_end_at_once

HANDED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,  # a closed terminal: the ranks stand in sessions of their own
}
"""What a launcher of ranks gets -> what it sends to them."""


def hold_back() -> None:
    """Block the signals in this thread and in every process that it starts, until those take them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)


def program(run: Callable[[], None]) -> Callable[[], None]:
    """A command that takes those signals first of all; until its work begins, Ctrl-C ends it at once."""

    @functools.wraps(run)
    def command() -> None:
        interrupts_end_at_once()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
        run()

    return command
