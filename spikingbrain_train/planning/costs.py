"""What a model costs in parameters and arithmetic, from its config alone. Pure Python: no torch.

Sums over its layers: what one has and does is said by its kinds (spikingbrain_train/architecture). Letters:
h hidden_size, V vocabulary, T tokens of text in a sequence, S sinks in front of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from spikingbrain_train.architecture.layers import (
    Layer,
    alike,
    embedding_weights,
    layers,
    output_weights,
)
from spikingbrain_train.architecture.weights import ONE_RANK, Split, Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig


def _on_rank(weights: Iterable[Weight], parallel: ParallelConfig) -> int:
    return sum(weight.numel_on_rank(parallel) for weight in weights)


def _over_all(model: ModelConfig, count: Callable[[Weight], int]) -> int:
    around = sum(map(count, (*embedding_weights(model), *output_weights(model))))
    inside = (number * sum(map(count, layer.weights(model))) for layer, number in alike(layers(model)))
    return around + sum(inside)


def mixer_parameters(model: ModelConfig, layer: Layer, parallel: ParallelConfig = ONE_RANK) -> int:
    """Parameters of a layer's mixers on one rank."""
    return _on_rank(layer.mixer_weights(model), parallel)


def layer_parameters(model: ModelConfig, layer: Layer, parallel: ParallelConfig = ONE_RANK) -> int:
    """Parameters of a layer on one rank."""
    return _on_rank(layer.weights(model), parallel)


def total_parameters(model: ModelConfig) -> int:
    """Distinct parameters without vocabulary padding, as a Hugging Face checkpoint counts them."""
    return _over_all(model, lambda weight: weight.numel)


def active_parameters(model: ModelConfig) -> int:
    """Parameters behind one token: all, vocabulary included, but routed experts that others are sent to."""
    return _over_all(model, lambda weight: weight.active_numel)


def new_parameters(model: ModelConfig) -> int:
    """Parameters that a dense source does not have: sinks, routers, and what is new in the mixers."""
    return _over_all(model, lambda weight: weight.numel if weight.is_new else 0)


def hidden_matrix_parameters(weights: Iterable[Weight], parallel: ParallelConfig) -> tuple[int, int]:
    """Parameters on one rank that are matrices of hidden layers: (of routed experts, all others)."""
    experts, others = 0, 0
    for weight in weights:
        if weight.is_hidden_matrix and weight.split in (Split.experts, Split.whole_experts):
            experts += weight.numel_on_rank(parallel)
        elif weight.is_hidden_matrix:
            others += weight.numel_on_rank(parallel)
    return experts, others


def virtual_stage_layers(model: ModelConfig, parallel: ParallelConfig, stage: int) -> list[range]:
    """The decoder layers (0-based) of each virtual stage of the ranks of pipeline stage ``stage``.

    There is one where a rank has no virtual stages.
    """
    numbers, pipeline = layers_per_stage(model, parallel), parallel.pipeline_model_parallel_size
    mine = range(stage, len(numbers), pipeline)
    firsts = [sum(numbers[:each]) for each in mine]
    return [range(first, first + numbers[each]) for each, first in zip(mine, firsts, strict=True)]


def stage_layers(model: ModelConfig, parallel: ParallelConfig, stage: int) -> list[int]:
    """The decoder layers (0-based) of the ranks of pipeline stage ``stage``, in order."""
    return [layer for layers in virtual_stage_layers(model, parallel, stage) for layer in layers]


def layers_per_stage(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """How many decoder layers each (virtual) stage has in the order of the model; the layout fits it."""
    stages = parallel.pipeline_model_parallel_size * parallel.virtual_stages
    return parallel.pipeline_model_parallel_layout or [model.num_layers // stages] * stages


def layers_of_stage(model: ModelConfig, parallel: ParallelConfig, stage: int) -> list[Layer]:
    """The layers of pipeline stage ``stage``, in order."""
    all_layers = layers(model)
    return [all_layers[layer] for layer in stage_layers(model, parallel, stage)]


def stage_routed_expert_parameters(model: ModelConfig, parallel: ParallelConfig, stage: int) -> int:
    """Parameters of routed experts that a rank of pipeline stage ``stage`` holds."""
    return sum(
        number * weight.numel_on_rank(parallel)
        for layer, number in alike(layers_of_stage(model, parallel, stage))
        for weight in layer.feed_forward_weights(model)
        if weight.split in (Split.experts, Split.whole_experts)
    )


def stage_parameters(model: ModelConfig, parallel: ParallelConfig, stage: int) -> int:
    """Parameters that a rank of pipeline stage ``stage`` holds, vocabulary padding included.

    The embedding and the sinks are on the first stage; the output projection and the final norm are on the
    last. A tied output projection is the embedding where both are on one stage, and a copy of it where they
    are not.
    """
    inside = sum(
        number * _on_rank(layer.weights(model), parallel)
        for layer, number in alike(layers_of_stage(model, parallel, stage))
    )
    return inside + parameters_around(model, parallel, stage)


def parameters_around(model: ModelConfig, parallel: ParallelConfig, stage: int) -> int:
    """Those of :func:`stage_parameters` that are in no layer."""
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    parameters = 0
    vocabulary = model.padded_vocab_size(tensor) // tensor * model.hidden_size

    def around(weights: Iterable[Weight]) -> int:
        return _on_rank((weight for weight in weights if not weight.pads_vocabulary), parallel)

    if stage == 0:
        parameters += vocabulary + around(embedding_weights(model))
    if stage == stages - 1:
        parameters += around(output_weights(model))
        if stages > 1 or not model.share_embeddings_and_output_weights:
            parameters += vocabulary
    return parameters


def mixer_core_flops(model: ModelConfig, layer: Layer, seq_length: int) -> float:
    """Forward FLOPs of a layer's mixers between their projections, per token of text.

    Softmax, gates and norms are left out, as is what a chunked or blocked kernel does beyond the definition.
    """
    return sum(kind.core_flops(model, seq_length) for kind in layer.mixers)


def mixer_projections(model: ModelConfig, layer: Layer) -> tuple[int, int]:
    """Matrix elements of a layer's mixers, as (those that read the layer's input, the others)."""
    weights = layer.mixer_weights(model)
    reading = sum(weight.matrix_numel for weight in weights if weight.reads_input)
    return reading, sum(weight.matrix_numel for weight in weights) - reading


def forward_flops_per_token(model: ModelConfig, seq_length: int, *, output_layer: bool = True) -> float:
    """Model FLOPs of the forward pass per token of text.

    Two per matrix element that it meets, plus the mixers' cores. What the sinks in front cost is shared out
    over the text. The embedding lookup is free, and neither vocabulary padding nor padding to an expert's
    capacity counts. ``output_layer=False`` stops at the final norm.
    """
    flops = sum(
        number * layer_forward_flops(model, layer, seq_length) for layer, number in alike(layers(model))
    )
    return flops + (output_forward_flops(model) if output_layer else 0.0)


def layer_forward_flops(model: ModelConfig, layer: Layer, seq_length: int) -> float:
    """The share of one layer in :func:`forward_flops_per_token`."""
    tokens = 1 + model.num_sink_tokens / seq_length
    matrices = sum(weight.matrix_numel for weight in layer.weights(model))
    return 2.0 * matrices * tokens + mixer_core_flops(model, layer, seq_length)


def output_forward_flops(model: ModelConfig) -> float:
    """The share of the vocabulary projection in :func:`forward_flops_per_token`."""
    return 2.0 * model.vocab_size * model.hidden_size
