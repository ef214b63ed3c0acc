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
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

import torch

from spikingbrain_train.parallel.process_groups import ProcessGroups

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that ask a run to stop."""


class StopSignals:
    """Holds the signals of :data:`STOPPING` back while it is entered, and says on all ranks which one came.

    The second Ctrl-C ends the process at once. Outside the main thread, where Python allows no handlers, it
    holds nothing back.

    Args:
        groups: process groups; all ranks ask :meth:`requested` together.
    """

    def __init__(self, groups: ProcessGroups) -> None:
        self.groups = groups
        self._received: signal.Signals | None = None
        self._agreed = False
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._owner = os.getpid()
        if signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN:
            # launch.sh has it ignored, so that it does not end torchrun: it must not be missed on the way.
            with suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGUSR1, self._receive)

    def __enter__(self) -> StopSignals:
        try:
            for number in STOPPING:
                self._before[number] = signal.signal(number, self._receive)
        except ValueError:  # not the main thread
            self._before = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # A run that stops is about to end: let the launcher's next signals not change its exit code.
            if error is None and self._agreed:
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

    def requested(self) -> signal.Signals | None:
        """The signal that any rank has received since the start, the same answer on every rank, else None.

        One reduction of a number over all ranks, and the host waits for what its device has been given so
        far: ask where it has waited anyway, between the loss and the update.
        """
        number = int(self._received or 0)
        if self.groups.world_size > 1:
            highest = torch.tensor(number, dtype=torch.int, device=self.groups.device)
            torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
            number = int(highest.item())
        self._agreed = number != 0
        return signal.Signals(number) if number else None
