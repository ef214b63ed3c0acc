"""A callback that keeps a run from being done before a test has had its turn."""

from __future__ import annotations

import time

from spikingbrain_train.training.callbacks.callback import Callback


class Pace(Callback):
    """Makes a step take at least so long, asleep, so that others can compute.

    Args:
        seconds: of sleep behind each step.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def step_end(self) -> None:
        time.sleep(self._seconds)
