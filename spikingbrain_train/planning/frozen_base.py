"""What training takes where most weights are frozen, beside adapters or some experts. Without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from spikingbrain_train.architecture.layers import Layer, alike, layers
from spikingbrain_train.architecture.trained_weights import share_trained, trained_experts
from spikingbrain_train.architecture.weights import Split, Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.planning.costs import layers_of_stage

_OF_EXPERTS = (Split.experts, Split.whole_experts)


def stage_trained(model: ModelConfig, parallel: ParallelConfig, stage: int) -> tuple[int, int]:
    """Parameters that train on a rank of pipeline stage ``stage``: (of routed experts, all others).

    Of the rank that has most of the experts that train.
    """
    experts, others = 0, 0
    for number, weight, share in _weights(model, layers_of_stage(model, parallel, stage)):
        if share and weight.split in _OF_EXPERTS:
            trained, of_a_rank = _most_on_a_rank(model, weight, parallel)
            experts += number * weight.numel_on_rank(parallel) * trained // of_a_rank
        elif share:
            others += number * weight.numel_on_rank(parallel)
    return experts, others


def trained_in_all(model: ModelConfig) -> int:
    """Parameters that train, over all ranks."""
    return sum(
        number * round(weight.numel * share) for number, weight, share in _weights(model, layers(model))
    )


def frozen_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """FLOPs of the gradients of all matrices that do not train, which a backward pass omits.

    Two per matrix element that a token meets, the vocabulary projection's included. Experts are taken to be
    evenly loaded.
    """
    tokens = 1 + model.num_sink_tokens / seq_length
    frozen = sum(
        number * weight.matrix_numel * (1 - share) for number, weight, share in _weights(model, layers(model))
    )
    return 2.0 * frozen * tokens + 2.0 * model.vocab_size * model.hidden_size


def _most_on_a_rank(model: ModelConfig, weight: Weight, parallel: ParallelConfig) -> tuple[int, int]:
    """Experts that train on the rank with most of them, and experts of a rank."""
    of_a_rank = weight.shape[0] // parallel.expert_model_parallel_size
    experts = trained_experts(model)
    if not experts:
        return of_a_rank, of_a_rank
    return max(Counter(number // of_a_rank for number in experts).values()), of_a_rank


def _weights(model: ModelConfig, among: Iterable[Layer]) -> Iterator[tuple[int, Weight, float]]:
    """Those of some layers, how many layers have them, and the share of each that trains."""
    for layer, number in alike(among):
        for weight in layer.weights(model):
            yield number, weight, share_trained(model, weight)
