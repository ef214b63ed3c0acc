"""When what follows from the step is set, and when it is reported."""

from __future__ import annotations

from abc import ABC, abstractmethod

from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report


class Schedule(Callback, ABC):
    """Sets what a schedule says for every step and evaluation, and reports it.

    It follows from the step alone: a run that goes on has it as it was.
    """

    def start(self) -> None:
        self._set()

    def step_begin(self) -> None:
        self._set()

    def before_evaluation(self) -> None:
        self._set()

    def report_due(self, report: Report) -> None:
        self._add_to(report)

    def after_evaluation(self, report: Report) -> None:
        self._add_to(report)

    @abstractmethod
    def _set(self) -> None:
        """Set it in the model, as of the run's step."""

    @abstractmethod
    def _add_to(self, report: Report) -> None:
        """Report what was set last."""
