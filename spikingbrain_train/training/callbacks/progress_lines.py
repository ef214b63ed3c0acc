"""What a person who watches a run reads: a line per report, and a status in between."""

from __future__ import annotations

from contextlib import ExitStack

from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report


class ProgressLines(Callback):
    """Prints reports, and says every few seconds that the current step still runs."""

    def __init__(self) -> None:
        self._watched = ExitStack()
        self._is_first_step = True

    def start(self) -> None:
        self._watched.enter_context(self.run.console.progress.watched())

    def step_begin(self) -> None:
        if self._is_first_step and self.run.groups.is_main_process:
            on_gpu = self.run.groups.device.type != "cpu"
            self.run.console.progress.first_step(self.run.state.iteration + 1, builds_kernels=on_gpu)
        self._is_first_step = False

    def step_end(self) -> None:
        if self.run.groups.is_main_process:
            self.run.console.progress.step(self.run.state.iteration)

    def log(self, report: Report) -> None:
        self.run.console.progress.report(
            report.iteration,
            report.metrics,
            report.shown,
            seconds_per_iteration=report.seconds_per_iteration,
        )

    def end(self, error: BaseException | None) -> None:
        self._watched.close()
