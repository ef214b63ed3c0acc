"""How long a run took until its first step was done, and what that time went into."""

from __future__ import annotations

import time

from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report


class StartUp(Callback):
    """Says it in a line of the log and of ``run_details.txt``, and as ``start/seconds`` with the first point.

    A first step builds and tunes kernels on GPUs; it ends for the host when the ranks have agreed on it.
    """

    def __init__(self) -> None:
        self._step_began: float | None = None
        self._is_told = False

    def step_begin(self) -> None:
        if self._step_began is None:
            self._step_began = time.monotonic()

    def report_due(self, report: Report) -> None:
        self._finish()
        if not self._is_told:
            self._is_told = True
            total = self.run.console.start_times.total
            assert total is not None
            report.add("start/seconds", total)

    def step_end(self) -> None:
        self._finish()

    def _finish(self) -> None:
        times = self.run.console.start_times
        if times.total is not None or self._step_began is None:
            return
        times.add("the first step", time.monotonic() - self._step_began)
        times.finish()
        self.run.console.rows([("first step", times.describe())])
        self.run.console.detail(f"first step {times.describe()}")
