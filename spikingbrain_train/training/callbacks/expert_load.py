"""How the tokens of a step were spread over the experts of every mixture-of-experts layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.models.feed_forwards.routing import CountsTokens, RouterStatistics
from spikingbrain_train.reporting.progress import Shown
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.heat_map import HeatMap
from spikingbrain_train.training.report import Report


@dataclass(frozen=True)
class ExpertLoad:
    """Sums over the tokens of one step, micro-batches and ranks included: the same numbers on every rank."""

    layers: list[int]
    """0-based indices, over the whole decoder, of the mixture-of-experts layers."""
    statistics: RouterStatistics
    """Each field with a leading dimension of layers."""

    @property
    def load_over_mean(self) -> Tensor:
        """[layers, experts] tokens routed to each expert over an even spread, before any was dropped."""
        assignments = self.statistics.expert_assignments
        return assignments / assignments.mean(1, keepdim=True)

    def metrics(self) -> dict[str, float]:
        """What curves are drawn of.

        ``moe/aux_loss`` (1 is perfect balance) and ``moe/z_loss``, unweighted means over layers;
        ``moe/dropped_tokens``, the share of (token, expert) pairs that capacities left out;
        ``moe/idle_experts``, the share of experts of all layers that got no token;
        ``moe/load_max_over_mean/layer_<i>``, the busiest expert of a layer in multiples of an even spread,
        and ``moe/load_max_over_mean``, that of the layer where it is busiest.
        """
        found = self.statistics
        busiest = self.load_over_mean.amax(1).tolist()
        return {
            "moe/aux_loss": (found.aux_loss / found.tokens).mean().item(),
            "moe/z_loss": (found.z_loss / found.tokens).mean().item(),
            "moe/dropped_tokens": (found.dropped_assignments.sum() / found.expert_assignments.sum()).item(),
            "moe/idle_experts": (found.expert_assignments == 0).double().mean().item(),
            "moe/load_max_over_mean": max(busiest),
            **{
                f"moe/load_max_over_mean/layer_{layer}": load
                for layer, load in zip(self.layers, busiest, strict=True)
            },
        }

    def heat_map(self) -> HeatMap:
        """``load_over_mean`` as a picture and a table."""
        return HeatMap(
            rows=self.load_over_mean.tolist(),
            row_names=[f"layer {layer}" for layer in self.layers],
            column_title="expert",
            value_title="load over mean",
        )


class ExpertLoadReport(Callback):
    """Adds the load of the experts in a step to its report, where the model has experts."""

    def start(self) -> None:
        model = self.run.state.model
        config = model.model_config
        kinds = [layer.feed_forward for layer in layers(config)]
        self._layers = [number for number, kind in enumerate(kinds) if kind.routes_tokens]
        self._routers = [module for module in model.modules() if isinstance(module, CountsTokens)]
        self._num_experts = max(kind.num_experts(config) for kind in kinds)
        self._shown = {"moe/load_max_over_mean": Shown("worst expert", "{:.2f}x")}
        if any(kind.drops_tokens(config) for kind in kinds):
            self._shown["moe/dropped_tokens"] = Shown("dropped", "{:.2%}")

    def step_begin(self) -> None:
        for router in self._routers:
            router.reset_statistics()

    def report_due(self, report: Report) -> None:
        if load := self._collect():
            for name, value in load.metrics().items():
                report.add(name, value, self._shown.get(name))
            report.heat_maps["moe/expert_load"] = load.heat_map()

    def _collect(self) -> ExpertLoad | None:
        """What was counted in the step, None if no token was routed.

        So it is in models without experts, and in alignment, where the student's feed-forwards do not run.
        """
        if not self._layers:
            return None
        size = self._num_experts + RouterStatistics.NUM_SCALARS
        device = self.run.groups.device
        sums = torch.zeros(len(self._layers), size, dtype=torch.float64, device=device)
        for router in self._routers:
            assert router.layer_number is not None  # set by the layer that built it
            sums[self._layers.index(router.layer_number - 1)] = router.statistics()
        # Every rank routes tokens of its own: stages other layers, tensor-parallel ranks (which share the
        # sequence where there are experts), context- and data-parallel ranks other tokens.
        torch.distributed.all_reduce(sums)
        statistics = RouterStatistics.unpack(sums.cpu())
        return ExpertLoad(self._layers, statistics) if statistics.tokens.any() else None
