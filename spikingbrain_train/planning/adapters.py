"""What training adapters beside a frozen model takes. Pure Python: no torch."""

from __future__ import annotations

from spikingbrain_train.architecture.layers import alike, layers
from spikingbrain_train.architecture.lora import trained_weight
from spikingbrain_train.architecture.weights import Split
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.planning.costs import layers_of_stage

_OF_EXPERTS = (Split.experts, Split.whole_experts)


def stage_adapters(model: ModelConfig, parallel: ParallelConfig, stage: int) -> tuple[int, int]:
    """Parameters of trained adapters on a rank of pipeline stage ``stage``: (routed experts', all others)."""
    counts = [0, 0]
    for layer, number in alike(layers_of_stage(model, parallel, stage)):
        for weight in layer.weights(model):
            if trained_weight(model, weight):
                counts[weight.split not in _OF_EXPERTS] += number * weight.numel_on_rank(parallel)
    return counts[0], counts[1]


def trained_adapters(model: ModelConfig) -> int:
    """Parameters of trained adapters over all ranks."""
    return sum(
        number * weight.numel
        for layer, number in alike(layers(model))
        for weight in layer.weights(model)
        if trained_weight(model, weight)
    )


def frozen_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """FLOPs of the gradients of all matrices that do not train, which a backward pass beside adapters omits.

    Two per matrix element that a token meets, the vocabulary projection's included.
    """
    tokens = 1 + model.num_sink_tokens / seq_length
    frozen = sum(
        number * weight.matrix_numel
        for layer, number in alike(layers(model))
        for weight in layer.weights(model)
        if not trained_weight(model, weight)
    )
    return 2.0 * frozen * tokens + 2.0 * model.vocab_size * model.hidden_size
