"""The end of the time that a run has: it saves before, and ends with a code that says "start me again"."""

from __future__ import annotations

import math
import os
import socket
import time
from typing import TYPE_CHECKING

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.reporting.activity import format_duration
from spikingbrain_train.training.callbacks.callback import Callback

if TYPE_CHECKING:
    from spikingbrain_train.training.stages.losses import StepLosses

SLURM_END = "SLURM_JOB_END_TIME"
"""Seconds since 1970, which Slurm sets in jobs."""


class WallTimeLimit(Callback):
    """Ends the run behind the step in which its time is up; once a step all ranks agree whether it is.

    That is ``cluster.exit_duration_in_mins`` after this process began, or
    ``cluster.exit_before_job_end_in_mins`` ahead of the end of a Slurm job, whatever comes first. Both are
    turned into a moment of the monotonic clock at the start: a wall clock that jumps later changes nothing.
    """

    def start(self) -> None:
        """Raises ConfigurationError where Slurm's end of the job is no number, or over before the start."""
        cluster, now = self.run.config.cluster, time.monotonic()
        self._deadline, self._reason = math.inf, ""
        if cluster.exit_duration_in_mins is not None:
            seconds = cluster.exit_duration_in_mins * 60
            self._deadline = self.run.console.start_times.began + seconds
            self._reason = f"cluster.exit_duration_in_mins={cluster.exit_duration_in_mins:g} is over"
        ahead = cluster.exit_before_job_end_in_mins
        left = None if ahead is None else _seconds_of_job()
        if ahead is not None and left is not None:
            of_job = now + left - ahead * 60
            if of_job < self._deadline:
                self._deadline, self._reason = of_job, "the Slurm job is about to end"
        if self._deadline < math.inf:
            left = max(0.0, self._deadline - now)
            self.run.console.rows([("wall time", f"saves and ends with code 75 in {format_duration(left)}")])

    def vote(self, losses: StepLosses) -> int:
        return int(time.monotonic() >= self._deadline)

    def agreed(self, number: int) -> None:
        if number:
            self.run.stop(self._reason or "the time of another rank is up")


def _seconds_of_job() -> float | None:
    """How long this process's Slurm job lasts from now; None outside of jobs that have an end."""
    end = os.environ.get(SLURM_END)
    if not end:
        return None
    try:
        left = float(end) - time.time()
    except ValueError:
        raise ConfigurationError(
            f"{SLURM_END}={end} is no number of seconds; unset it, or leave it aside with "
            "cluster.exit_before_job_end_in_mins=null"
        ) from None
    if left <= 0:
        # Taken at its word, it would end this run after a step, and every start after a requeue.
        raise ConfigurationError(
            f"by the clock of {socket.gethostname()} this Slurm job ended {format_duration(-left)} ago "
            f"({SLURM_END}); set the clock of that node, or leave the end aside with "
            "cluster.exit_before_job_end_in_mins=null"
        )
    return left
