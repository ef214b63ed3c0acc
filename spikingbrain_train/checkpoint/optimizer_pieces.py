"""What each rank stores of a distributed optimizer's state: its own part, as it lies, exchanged with nobody.

The distributed optimizer cuts the weights of a bucket, one behind the other, into equal parts, one for each
data-parallel rank. megatron-core's form of checkpoints that any topology reads (``fully_reshardable``) holds
whole parameters, for which it gathers everything on every rank: three times the parameters in fp32, in steps
that stand still. A part of a parameter is a few boxes of it, however, and the format takes boxes of any size:
so every rank writes what it has. The files are read as before.

Where buckets end in padding, megatron-core's gathering leaves it out and its offsets do not, so that what is
stored of a parameter in the second bucket or a later one begins too late. Parts that are not gathered have no
such offsets.

Weights that are stored transposed (0.16's GroupedMLP) are no boxes in the order of their elements: each is
gathered for itself, and the first data-parallel rank writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from spikingbrain_train.checkpoint.optimizer_state import chain_of
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.runtime.optimizer_patches import stored_by

OPTIMIZER_PREFIX = "optimizer.state"  # as megatron-core names them
_STEP = "step"  # of every parameter the same: stored with the groups
_ADAMS = ("param", "exp_avg", "exp_avg_sq")


def optimizer_state_to_save(
    optimizer: MegatronOptimizer, weights: dict[str, Any], metadata: dict[str, Any]
) -> dict[Any, Any]:
    """An optimizer's part of a checkpoint, from where it lies; a collective of its data-parallel ranks.

    Copied and exchanged is only what is stored in another order than it lies in.

    Args:
        optimizer: with the state of at least one step.
        weights: the model's sharded state.
        metadata: megatron-core's sharding options.
    """
    with ExitStack() as stack:
        for part in chain_of(optimizer):
            if isinstance(part, DistributedOptimizer):
                stack.enter_context(stored_by(part, _pieces))
        sharded: dict[Any, Any] = optimizer.sharded_state_dict(weights, metadata=metadata)
    return sharded


@contextmanager
def own_parameters_to_fill(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Within, what is read for a distributed optimizer are the parameters of which this rank holds elements.

    Each whole, and the states that it has: the moments of AdamW, or the momentum of Muon.

    Args:
        optimizer: whose state is there.
    """
    with ExitStack() as stack:
        for part in chain_of(optimizer):
            if isinstance(part, DistributedOptimizer):
                stack.enter_context(stored_by(part, _wholes_to_fill))
        yield


def _wholes_to_fill(optimizer: DistributedOptimizer, weights: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Number of a parameter -> name of a state -> all of it, in memory of its own."""
    stored = {id(each.data): each for each in nested_values(weights) if is_sharded(each)}
    begins = {id(parameter): begin for parameter, begin in _own_parts(optimizer)}
    numbers = (parameter for buffer in optimizer.buffers for parameter in buffer.param_index_map)
    state: dict[int, dict[str, Any]] = {}
    for number, parameter in enumerate(numbers):
        if id(parameter) not in begins:
            continue
        # The rank of its first elements reads it in the eyes of megatron-core, others read copies.
        copy = 0 if begins[id(parameter)] == 0 else optimizer.data_parallel_group.rank()
        sharded = stored[id(parameter)]
        sharded = replace(sharded, replica_id=(*sharded.replica_id[:-1], copy))
        state[number] = {}
        for name in optimizer._get_main_param_and_optimizer_states(parameter):
            if name != _STEP:
                values = torch.empty(parameter.shape, dtype=torch.float32)
                key = f"{OPTIMIZER_PREFIX}.{name}.{sharded.key}"
                as_floats = {} if isinstance(sharded, ShardedTensorFactory) else {"dtype": values.dtype}
                state[number][name] = replace(sharded, key=key, data=values, **as_floats)
    return state


def _pieces(optimizer: DistributedOptimizer, weights: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Number of a parameter -> name of a state -> the boxes of it that this rank holds."""
    stored = {id(each.data): each for each in nested_values(weights) if is_sharded(each)}
    begins = {id(parameter): begin for parameter, begin in _own_parts(optimizer)}
    state: dict[int, dict[str, Any]] = {}
    numbers = (parameter for buffer in optimizer.buffers for parameter in buffer.param_index_map)
    for number, parameter in enumerate(numbers):
        sharded = stored[id(parameter)]
        parts = unfolded(sharded)
        tensors: dict[str, torch.Tensor] = {}
        begin = 0
        if id(parameter) in begins:
            tensors = optimizer._get_main_param_and_optimizer_states(parameter)
            begin = begins[id(parameter)]
        if not all(_is_part(each.data, parameter) for each in parts):
            if whole := _gathered(sharded, parameter, tensors, begin, optimizer):
                state[number] = whole
        elif tensors:
            stored_parts = [StoredPart.of(part, parameter) for part in parts]
            state[number] = {
                name: [
                    box
                    for part in stored_parts
                    for box, _ in boxes_of(
                        part, tensor.detach().reshape(-1), begin, f"{OPTIMIZER_PREFIX}.{name}."
                    )
                ]
                for name, tensor in tensors.items()
                if name != _STEP
            }
    return state


def _own_parts(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int]]:
    """Parameters of which this rank holds elements, and the number of the first of those."""
    for of_buffer in optimizer.gbuf_ranges:
        for buckets in of_buffer.values():
            for bucket in buckets:
                for parameter, place in bucket["param_map"].items():
                    yield parameter, place["param"].start


def is_sharded(value: Any) -> bool:
    """Whether it is a tensor of the checkpoint, or several."""
    return isinstance(value, (ShardedTensor, ShardedTensorFactory))


def unfolded(sharded: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """A parameter that is stored as several tensors (gate and up projection) as those."""
    if isinstance(sharded, ShardedTensor):
        return [sharded]
    return [each for each in nested_values({"": sharded.build()}) if isinstance(each, ShardedTensor)]


def _is_part(data: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Whether it shows elements of the parameter, and is no copy of them."""
    return data.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()


def _gathered(
    sharded: Any, parameter: torch.Tensor, tensors: dict[str, torch.Tensor], begin: int, optimizer: Any
) -> dict[str, Any]:
    """Name of a state -> it as a whole, on the first data-parallel rank; a collective of all of them.

    Args:
        sharded: how the parameter is stored.
        parameter: on this rank, whole.
        tensors: what this rank holds of it, nothing on some.
        begin: number of the first of their elements.
        optimizer: whose ranks share the parameter.
    """
    found: dict[str, Any] = {}
    for name in _ADAMS:
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if name in tensors:
            values = tensors[name].detach().reshape(-1)
            whole[begin : begin + values.numel()] = values
        # As whole numbers, of which all but one rank's are zero: no bit changes, not even that of -0.
        torch.distributed.all_reduce(whole.view(torch.int32), group=optimizer.data_parallel_group)
        if optimizer.data_parallel_group.rank() == 0:
            key = f"{OPTIMIZER_PREFIX}.{name}.{sharded.key}"
            found[name] = replace(sharded, key=key, data=whole.view(parameter.shape))
    return found


@dataclass(frozen=True)
class StoredPart:
    """A tensor of the checkpoint that is a range of a parameter's elements."""

    sharded: ShardedTensor
    """How it is stored; without data."""
    first: int
    """Number of its first element among the parameter's."""
    shape: tuple[int, ...]

    @classmethod
    def of(cls, sharded: ShardedTensor, parameter: torch.Tensor) -> StoredPart:
        """A part of a parameter that is whole on this rank."""
        data = sharded.data
        if not _is_part(data, parameter) or not data.is_contiguous():
            raise CheckpointError(
                f"{sharded.key} is stored across the order of its elements, as experts of grouped_gemm are; "
                "set cluster.kernels.experts=sequential, or transformer_engine where that is installed"
            )
        first = (data.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        return cls(replace(sharded, data=None), first, tuple(data.shape))


def boxes_of(
    stored: StoredPart, values: torch.Tensor, begin: int, prefix: str
) -> Iterator[tuple[ShardedTensor, torch.Tensor]]:
    """The boxes of a stored tensor that a range of a parameter's elements fills, and the values of each.

    Args:
        stored: the parameter, or a part of it.
        values: [elements] of this rank, which no other data-parallel rank has.
        begin: number of the first of them among the parameter's elements.
        prefix: of the key.
    """
    sharded = stored.sharded
    low = max(begin, stored.first)
    high = min(begin + values.numel(), stored.first + prod(stored.shape))
    axes = sharded.prepend_axis_num  # of the checkpoint, where a layer is one of several
    for offset, shape, at in boxes_of_range(stored.shape, low - stored.first, high - stored.first):
        flat = values[stored.first + at - begin :][: prod(shape)]
        box = flat.view(*(1,) * axes, *shape)
        yield (
            ShardedTensor(
                key=f"{prefix}{sharded.key}",
                data=box,
                dtype=box.dtype,
                local_shape=tuple(box.shape),
                global_shape=sharded.global_shape,
                global_offset=tuple(
                    whole + part
                    for whole, part in zip(sharded.global_offset, (0,) * axes + offset, strict=True)
                ),
                axis_fragmentations=None,
                replica_id=(*sharded.replica_id[:-1], 0),
            ),
            flat,
        )


def boxes_of_range(
    shape: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """The boxes that a range of a tensor's elements, in their order, is made of; for a matrix at most three.

    Args:
        shape: of the tensor.
        start: number of the first element.
        stop: number of the first element behind the range.

    Returns:
        Of each box where it begins, its shape, and the number of its first element; in that order.
    """
    if start >= stop:
        return
    if not shape:
        yield (), (), 0
        return
    row = prod(shape[1:])
    while start < stop:
        number, within = divmod(start, row)
        rows = 0 if within else (stop - start) // row
        if rows:
            yield (number, *(0,) * (len(shape) - 1)), (rows, *shape[1:]), start
            start += rows * row
            continue
        end = min(row, stop - number * row)
        for offset, size, at in boxes_of_range(shape[1:], within, end):
            yield (number, *offset), (1, *size), number * row + at
        start = number * row + end
