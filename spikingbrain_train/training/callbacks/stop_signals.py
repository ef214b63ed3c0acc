"""Being asked to stop: the step is finished, saved, and the run ends with a code that says "start me again".

Slurm sends SIGUSR1 ahead of a time limit (scripts/slurm/launch.sh), and SIGTERM when it cancels. At a
preemption it sends SIGUSR1 where its PreemptParameters hold send_user_signal, else SIGTERM, and waits for the
GraceTime of the partition. torchrun hands SIGTERM and SIGINT on, and kills what still runs after
TORCH_ELASTIC_SHUTDOWN_TIMEOUT (torch 2.6: after 30 s). A user presses Ctrl-C. Ranks get a signal at different
times, some may get none: once a step they agree, so that all stop after the same one.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from spikingbrain_train.parallel.heartbeats import failed_collective
from spikingbrain_train.training.callbacks.callback import Callback

if TYPE_CHECKING:
    from spikingbrain_train.training.stages.losses import StepLosses

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that ask a run to stop."""


class StopSignals(Callback):
    """Holds the signals of :data:`STOPPING` back from the first step on, and stops the run when one came.

    The second Ctrl-C ends the process at once. Outside the main thread, where Python allows no handlers, it
    holds nothing back.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._agreed: signal.Signals | None = None
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._holds_back = False
        self._owner, self._parent = os.getpid(), os.getppid()
        if signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN:
            # launch.sh has it ignored, so that it does not end torchrun: it must not be missed on the way.
            with suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGUSR1, self._receive)

    def step_begin(self) -> None:
        if self._holds_back:
            return
        self._holds_back = True
        try:
            for number in STOPPING:
                self._before[number] = signal.signal(number, self._receive)
        except ValueError:  # not the main thread
            self._before = {}

    def vote(self, losses: StepLosses) -> int:
        if self._received is None and self._is_left_alone():
            rank = self.run.groups.rank
            sys.stderr.write(
                f"warning: torchrun has ended without its ranks; rank {rank} saves and ends, too\n"
            )
            self._received = signal.SIGTERM
        return int(self._received or 0)

    def _is_left_alone(self) -> bool:
        """Whether torchrun's agent, which started this process, was killed: nobody would end the run."""
        return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self._parent

    def agreed(self, number: int) -> None:
        if number:
            self._agreed = signal.Signals(number)
            self.run.stop(self._agreed.name)
            self.run.callbacks.signal(self._agreed)

    def end(self, error: BaseException | None) -> None:
        for number, handler in self._before.items():
            # A run that stops is about to end: let the launcher's next signals not change its exit code. Of
            # one that has lost a rank somebody has yet to say which; the launcher ends them all meanwhile.
            is_lost = number is signal.SIGTERM and failed_collective(error) is not None
            if is_lost or (error is None and self._agreed is not None):
                signal.signal(number, signal.SIG_IGN)
            else:
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        # Forked loader processes inherit this handler, and the whole group gets the terminal's signal: their
        # parent still needs them for the step, and ends them.
        if os.getpid() != self._owner:
            return
        if number == signal.SIGINT and self._received is signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number)
