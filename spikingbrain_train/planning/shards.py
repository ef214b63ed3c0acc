"""Which part of every weight lies on which rank, at any topology: the chunks of a checkpoint. Without torch.

The same layout that megatron-core's modules describe in their sharded state dicts: the output projection and
the feed-forward's second matrix are split by columns, all else by rows; matrices that lie in one parameter
(gate and up projection) are split each for itself; routed experts lie one by one. What is whole on several
ranks is stored once, by the first of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spikingbrain_train.architecture.layers import embedding_weights, layers, output_weights
from spikingbrain_train.architecture.weights import Shape, Split, Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.planning.costs import stage_layers
from spikingbrain_train.planning.planner import smallest_stage


@dataclass(frozen=True)
class Shard:
    """A part of a tensor that one rank stores."""

    rank: int
    """Of the smallest world of its topology: one replica of the model, without context parallelism."""
    offset: Shape
    """Where in the tensor it begins."""
    shape: Shape


@dataclass(frozen=True)
class ShardedWeight:
    """A weight with the parts that ranks store."""

    weight: Weight
    """Under its whole name."""
    size: Shape
    """Shape over all ranks, with the vocabulary padded for them."""
    shards: tuple[Shard, ...]


def num_ranks(parallel: ParallelConfig) -> int:
    """Ranks of the smallest world of a topology."""
    return smallest_stage(parallel) * parallel.pipeline_model_parallel_size


def sharded_weights(model: ModelConfig, parallel: ParallelConfig) -> Iterator[ShardedWeight]:
    """Every weight of ``model`` with its parts, stage after stage.

    Args:
        model: the network, which the degrees of ``parallel`` divide (planning.parallel_checks.check_split).
        parallel: the topology; context and data parallelism split no weights and are not read.
    """
    stages = parallel.pipeline_model_parallel_size
    described = layers(model)
    for stage in range(stages):
        weights = list(embedding_weights(model)) if stage == 0 else []
        for number in stage_layers(model, parallel, stage):
            weights += [w.below(f"decoder.layers.{number}.") for w in described[number].weights(model)]
        if stage == stages - 1:
            weights += output_weights(model)
        first_rank = stage * smallest_stage(parallel)
        for weight in weights:
            size = _padded(weight, model, parallel)
            yield ShardedWeight(weight, size, tuple(_shards(weight, size, parallel, first_rank)))


def _padded(weight: Weight, model: ModelConfig, parallel: ParallelConfig) -> Shape:
    if not weight.pads_vocabulary:
        return weight.shape
    return (model.padded_vocab_size(parallel.tensor_model_parallel_size), *weight.shape[1:])


def _shards(weight: Weight, size: Shape, parallel: ParallelConfig, first_rank: int) -> Iterator[Shard]:
    if weight.split is Split.none:
        yield Shard(first_rank, (0,) * len(size), size)
        return
    if weight.split is Split.tensor:
        for part, (offset, shape) in _parts(weight, size, parallel.tensor_model_parallel_size):
            yield Shard(first_rank + part, offset, shape)
        return
    experts, tensor = size[0], parallel.expert_tensor_size if weight.split is Split.experts else 1
    per_rank = experts // parallel.expert_model_parallel_size
    for expert in range(experts):
        first = first_rank + expert // per_rank * parallel.expert_tensor_size
        for part, (offset, shape) in _parts(weight, size[1:], tensor):
            yield Shard(first + part, (expert, *offset), (1, *shape))


def _parts(weight: Weight, size: Shape, number: int) -> Iterator[tuple[int, tuple[Shape, Shape]]]:
    """Each of the ``number`` ranks with offset and shape of what it holds."""
    axis = weight.split_axis
    start = 0
    for length in _segments(weight, size, axis):
        part = length // number
        for rank in range(number):
            offset = tuple(start + rank * part if dim == axis else 0 for dim in range(len(size)))
            shape = tuple(part if dim == axis else whole for dim, whole in enumerate(size))
            yield rank, (offset, shape)
        start += length


def _segments(weight: Weight, size: Shape, axis: int) -> list[int]:
    """Rows of each matrix that lies in it and is split for itself."""
    if not weight.is_split_by_segments:
        return [size[axis]]
    rows = [shape[0] for shape in weight.shapes]
    return [row * size[0] // sum(rows) for row in rows]  # experts side by side: each matrix of all of them
