"""How the tokens of a step were spread over the experts of every mixture-of-experts layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.models.feed_forwards.moe.router import RouterStatistics, SequenceBalancedRouter
from spikingbrain_train.models.gpt_model import HybridGPTModel
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.training.heat_map import HeatMap


@dataclass(frozen=True)
class ExpertLoad:
    """Sums over the tokens of one step, micro-batches and ranks included: the same numbers on every rank."""

    layers: list[int]
    """0-based indices, over the whole decoder, of the mixture-of-experts layers."""
    statistics: RouterStatistics
    """Each field with a leading dimension of layers."""

    @property
    def load_over_mean(self) -> Tensor:
        """[layers, experts] visits of each expert in multiples of an even spread, before any was dropped."""
        assignments = self.statistics.expert_assignments
        return assignments / assignments.mean(1, keepdim=True)

    def metrics(self) -> dict[str, float]:
        """``moe/aux_loss`` (1 is perfect balance) and ``moe/z_loss``, unweighted means over layers;
        ``moe/dropped_tokens``, the share of visits that capacities left out; and
        ``moe/load_max_over_mean/layer_<i>``, the busiest expert of a layer in multiples of an even spread.
        """
        found = self.statistics
        busiest = self.load_over_mean.amax(1).tolist()
        return {
            "moe/aux_loss": (found.aux_loss / found.tokens).mean().item(),
            "moe/z_loss": (found.z_loss / found.tokens).mean().item(),
            "moe/dropped_tokens": (found.dropped_assignments.sum() / found.expert_assignments.sum()).item(),
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


class ExpertLoadCounter:
    """Collects what the routers of a model count.

    Args:
        model: this rank's pipeline stage.
        groups: process groups.
    """

    def __init__(self, model: HybridGPTModel, groups: ProcessGroups) -> None:
        kinds = [layer.feed_forward for layer in layers(model.model_config)]
        self.layers = [layer for layer, kind in enumerate(kinds) if kind.routes_tokens]
        self._routers = [module for module in model.modules() if isinstance(module, SequenceBalancedRouter)]
        self._num_experts = model.model_config.moe.num_experts
        self._device = groups.device

    def reset(self) -> None:
        """Start a step."""
        for router in self._routers:
            router.reset_statistics()

    def collect(self) -> ExpertLoad | None:
        """What was counted since :meth:`reset`; every rank must call it. None if no token was routed, as in
        models without experts and in alignment, where the student's feed-forwards do not run."""
        if not self.layers:
            return None
        size = self._num_experts + RouterStatistics.NUM_SCALARS
        sums = torch.zeros(len(self.layers), size, dtype=torch.float64, device=self._device)
        for router in self._routers:
            assert router.layer_number is not None  # set by the layer that built it
            sums[self.layers.index(router.layer_number - 1)] = router.statistics_sums
        # Every rank routes tokens of its own: stages other layers, tensor-parallel ranks (which share the
        # sequence where there are experts), context- and data-parallel ranks other tokens.
        torch.distributed.all_reduce(sums)
        statistics = RouterStatistics.unpack(sums.cpu())
        return ExpertLoad(self.layers, statistics) if statistics.tokens.any() else None
