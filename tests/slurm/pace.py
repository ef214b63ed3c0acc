"""A callback that keeps a run from being done before a test has had its turn."""

from __future__ import annotations

import os
import time

from spikingbrain_train.training.callbacks.callback import Callback


class Pace(Callback):
    """Makes a step take at least so long, asleep, so that others can compute.

    Args:
        seconds: of sleep behind each step.
        until: a file; once it is there, steps take the time that they need.
    """

    def __init__(self, seconds: float, until: str = "") -> None:
        self._seconds, self._until = seconds, until

    def step_end(self) -> None:
        if not os.path.exists(self._until):
            time.sleep(self._seconds)
