"""How far the sub-norms of a model that began dense have come in."""

from __future__ import annotations

from spikingbrain_train.models.linears.sub_norm import set_share
from spikingbrain_train.training.callbacks.schedule import Schedule
from spikingbrain_train.training.report import Report


class SubNormSchedule(Schedule):
    """What ``stage.sub_norm_annealing`` says: ``sub_norms/share``."""

    def _set(self) -> None:
        annealing = self.run.config.stage.sub_norm_annealing
        self._share = annealing.share(self.run.state.iteration)
        if annealing.anneal_iters:
            set_share(self.run.state.model, self._share)

    def _add_to(self, report: Report) -> None:
        if self.run.config.stage.sub_norm_annealing.anneal_iters:
            report.add("sub_norms/share", self._share)
