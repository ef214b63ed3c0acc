"""What each layer of a model computes and sends, worked out once for many layouts. Without torch."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

from spikingbrain_train.architecture.context_traffic import NO_TRAFFIC, ContextTraffic
from spikingbrain_train.architecture.fp8 import fp8_weights
from spikingbrain_train.architecture.layers import Layer, layers
from spikingbrain_train.architecture.weights import Split
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.planning.costs import (
    layer_forward_flops,
    output_forward_flops,
    parameters_around,
)

_OF_EXPERTS = (Split.experts, Split.whole_experts)


@dataclass(frozen=True)
class LayerWork:
    """A layer's forward FLOPs per token of text, over all ranks."""

    forward_flops: float
    has_feed_forward: bool
    routes_tokens: bool
    fp8_share: float
    """Of these FLOPs, in products that are FP8 ones where a run asks for it."""


class ModelWork:
    """The layers of a run's model; what depends on a layout is remembered by the degrees that it depends on.

    Args:
        config: the run; its model, precision, sequence length and context-parallel methods count, its degrees
            do not.
    """

    def __init__(self, config: RunConfig) -> None:
        model, length = config.model, config.stage.seq_length
        self.config = config
        self.layers = layers(model)
        self.output_flops = output_forward_flops(model)
        self.of_layers = {layer: self._work(layer, length) for layer in set(self.layers)}
        self.parameters_of = cache(self._parameters_of)
        self.parameters_around = cache(self._parameters_around)
        self.parameters_until = cache(self._parameters_until)
        self.known_seconds: dict[Hashable, Any] = {}
        """What planning/step_time.py has reckoned of the layers, which stages and sharding do not change."""

    def _work(self, layer: Layer, length: int) -> LayerWork:
        model = self.config.model
        flops = layer_forward_flops(model, layer, length)
        return LayerWork(
            flops,
            layer.feed_forward.is_there,
            layer.feed_forward.routes_tokens,
            fp8_flops(model, layer, length) / flops,
        )

    def _parameters_of(self, layer: Layer, tensor: int, expert: int, expert_tensor: int) -> tuple[int, int]:
        """Parameters of a layer on a rank: (of routed experts, all others)."""
        parallel = ParallelConfig(
            tensor_model_parallel_size=tensor,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=expert_tensor,
        )
        experts, others = 0, 0
        for weight in layer.weights(self.config.model):
            if weight.split in _OF_EXPERTS:
                experts += weight.numel_on_rank(parallel)
            else:
                others += weight.numel_on_rank(parallel)
        return experts, others

    def _parameters_until(self, tensor: int, expert: int, expert_tensor: int) -> tuple[list[int], list[int]]:
        """Those of the first 0, 1, 2 ... layers: (of routed experts, all others)."""
        each = [self.parameters_of(layer, tensor, expert, expert_tensor) for layer in self.layers]
        experts, others = zip(*each, strict=True)
        return list(accumulate(experts, initial=0)), list(accumulate(others, initial=0))

    def _parameters_around(self, tensor: int, stages: int, stage: int) -> int:
        """Parameters of a rank that are in no layer: embedding, sinks, final norm, output projection."""
        parallel = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=stages)
        return parameters_around(self.config.model, parallel, stage)


def fp8_flops(model: ModelConfig, layer: Layer, length: int) -> float:
    """Forward FLOPs per token of text, over all ranks, in products that can be FP8 ones."""
    weights = fp8_weights((*layer.mixer_weights(model), *layer.feed_forward_weights(model)))
    return 2.0 * sum(each.matrix_numel for each in weights) * (1 + model.num_sink_tokens / length)


def recomputed_flops(config: RunConfig, layer: Layer) -> float:
    """What the backward pass computes again, per token of text, over all ranks.

    Routers and activation functions are nothing beside matrices, through which sink tokens go as well.
    """
    model, length = config.model, config.stage.seq_length
    if config.parallel.recompute is Recompute.full:
        return layer_forward_flops(model, layer, length)
    feed_forward, weights = layer.feed_forward, layer.feed_forward_weights(model)
    again = sum(each.matrix_numel for each in weights if feed_forward.computes_again(config, each))
    return 2.0 * again * (1 + model.num_sink_tokens / length)


def context_traffic(config: RunConfig, layer: Layer) -> ContextTraffic | None:
    """What a rank sends in the mixers of a layer for one micro-batch; None where a mixer does not say."""
    if config.parallel.context_parallel_size == 1:
        return NO_TRAFFIC
    found = [kind.context_traffic(config) for kind in layer.mixers]
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return None
    # Branches that send all-to-all beside ones that send along a ring are counted as all-to-all.
    return ContextTraffic(
        sum(each.forward for each in known),
        sum(each.backward for each in known),
        any(each.all_to_all for each in known),
    )
