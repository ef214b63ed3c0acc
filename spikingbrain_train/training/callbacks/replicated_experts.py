"""How even the load of expert-parallel ranks is, with copies of busy experts and as it were without."""

from __future__ import annotations

import torch

from spikingbrain_train.models.feed_forwards.routing import CountsRankLoad
from spikingbrain_train.reporting.progress import Shown
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report

_SHOWN = {"moe/rank_load_max_over_mean": Shown("busiest rank", "{:.2f}x")}


class ReplicatedExpertsReport(Callback):
    """Adds it to a report where ``parallel.replicate_expert_load`` is set and tokens were routed.

    Of all layers, micro-batches and groups of a step: tokens of the busiest rank over those of a mean one,
    ``moe/rank_load_max_over_mean`` as they were computed, ``moe/rank_load_max_over_mean_uncopied`` as their
    owners would have; ``moe/replicated_experts``, copied experts of a layer, on average.
    """

    def start(self) -> None:
        self._layers = [each for each in self.run.state.model.modules() if isinstance(each, CountsRankLoad)]

    def step_begin(self) -> None:
        for layer in self._layers:
            layer.load_sums.zero_()

    def report_due(self, report: Report) -> None:
        if self.run.config.parallel.replicate_expert_load is None:
            return
        sums = torch.zeros(5, dtype=torch.float64, device=self.run.groups.device)
        for layer in self._layers:
            sums += layer.load_sums
        torch.distributed.all_reduce(sums)
        before, after, mean, copied, passes = sums.tolist()
        if not mean:
            return
        metrics = {
            "moe/rank_load_max_over_mean": after / mean,
            "moe/rank_load_max_over_mean_uncopied": before / mean,
            "moe/replicated_experts": copied / passes,
        }
        for name, value in metrics.items():
            report.add(name, value, _SHOWN.get(name))
