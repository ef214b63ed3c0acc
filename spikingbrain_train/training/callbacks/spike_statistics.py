"""How many spikes a model sends on held-out data."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from spikingbrain_train.models.spiking_linear import collect_spike_statistics
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report


class SpikeStatisticsOfEvaluations(Callback):
    """Reports ``spiking/sparsity`` and ``spiking/share_up_to_7`` of every evaluation (docs/spiking.md)."""

    def __init__(self) -> None:
        self._counting = ExitStack()

    def before_evaluation(self) -> None:
        run = self.run
        self._statistics = self._counting.enter_context(
            collect_spike_statistics(run.state.model, run.groups.device)
        )

    def after_evaluation(self, report: Report) -> None:
        self._counting.close()
        if self.run.config.model.spiking.projections:
            torch.distributed.all_reduce(self._statistics.histogram)
            report.metrics["spiking/sparsity"] = self._statistics.sparsity()
            report.metrics["spiking/share_up_to_7"] = self._statistics.share_up_to(7)

    def end(self, error: BaseException | None) -> None:
        self._counting.close()
