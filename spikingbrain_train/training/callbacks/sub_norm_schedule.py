"""How far the sub-norms of a model that began dense have come in."""

from __future__ import annotations

from spikingbrain_train.models.linears.sub_norm import set_share
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report


class SubNormSchedule(Callback):
    """Sets what ``stage.sub_norm_annealing`` says for every step and evaluation, and reports it.

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

    def _set(self) -> None:
        annealing = self.run.config.stage.sub_norm_annealing
        self._share = annealing.share(self.run.state.iteration)
        if annealing.anneal_iters:
            set_share(self.run.state.model, self._share)

    def _add_to(self, report: Report) -> None:
        if self.run.config.stage.sub_norm_annealing.anneal_iters:
            report.add("sub_norms/share", self._share)
