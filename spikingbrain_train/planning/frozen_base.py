"""What training takes where a linear transform freezes all weights but its own: adapters. Without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from spikingbrain_train.architecture.layers import Layer, alike, layers
from spikingbrain_train.architecture.linear_transforms import trains
from spikingbrain_train.architecture.weights import Split, Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.planning.costs import layers_of_stage

_OF_EXPERTS = (Split.experts, Split.whole_experts)


def stage_trained(model: ModelConfig, parallel: ParallelConfig, stage: int) -> tuple[int, int]:
    """Parameters that train on a rank of pipeline stage ``stage``: (of routed experts, all others)."""
    experts, others = 0, 0
    for number, weight in _weights(model, layers_of_stage(model, parallel, stage), trained=True):
        if weight.split in _OF_EXPERTS:
            experts += number * weight.numel_on_rank(parallel)
        else:
            others += number * weight.numel_on_rank(parallel)
    return experts, others


def trained_in_all(model: ModelConfig) -> int:
    """Parameters that train, over all ranks."""
    return sum(number * weight.numel for number, weight in _weights(model, layers(model), trained=True))


def frozen_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """FLOPs of the gradients of all matrices that do not train, which a backward pass omits.

    Two per matrix element that a token meets, the vocabulary projection's included.
    """
    tokens = 1 + model.num_sink_tokens / seq_length
    frozen = sum(
        number * weight.matrix_numel for number, weight in _weights(model, layers(model), trained=False)
    )
    return 2.0 * frozen * tokens + 2.0 * model.vocab_size * model.hidden_size


def _weights(model: ModelConfig, among: Iterable[Layer], *, trained: bool) -> Iterator[tuple[int, Weight]]:
    """Those of some layers that train, or that do not, and how many layers have them."""
    for layer, number in alike(among):
        for weight in layer.weights(model):
            if trains(model, weight.name) == trained:
                yield number, weight
