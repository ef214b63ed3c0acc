"""The schedule of the spike threshold: coarser spikes step by step, and the same ones after a resume."""

from __future__ import annotations

from spikingbrain_train.config.model import SpikingConfig
from spikingbrain_train.config.run import SpikeAnnealingConfig
from spikingbrain_train.models.spiking_linear import set_spike_k
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report


class SpikeAnnealing(Callback):
    """Sets k of the model's linears for every step and evaluation, and reports it as ``spiking/k``."""

    _k: float | None = None
    """What the model has; None in models without spikes."""

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
        config, state = self.run.config, self.run.state
        if config.model.spiking.projections:
            self._k = spike_k(config.stage.spike_annealing, config.model.spiking, state.iteration)
            set_spike_k(state.model, self._k)

    def _add_to(self, report: Report) -> None:
        if self._k is not None:
            report.metrics["spiking/k"] = self._k


def spike_k(annealing: SpikeAnnealingConfig, spiking: SpikingConfig, iteration: int) -> float:
    """k of the step that follows ``iteration`` finished ones, and of an evaluation between them.

    ``init_k * (k / init_k) ** (iteration / anneal_iters)`` until k reaches ``model.spiking.k``, where it
    stays. It depends on nothing else, so a resumed run repeats the uninterrupted one.
    """
    if annealing.init_k is None or iteration >= annealing.anneal_iters:
        return spiking.k
    return annealing.init_k * (spiking.k / annealing.init_k) ** (iteration / annealing.anneal_iters)
