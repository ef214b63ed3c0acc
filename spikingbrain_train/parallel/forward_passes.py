"""Forward passes of any number of micro-batches through a pipeline, with virtual stages or without.

megatron-core's interleaved schedule takes micro-batches in groups of as many as there are pipeline ranks.
What lacks in the last group is filled with micro-batches that no model is asked about.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

_FILLER = object()
"""A micro-batch that is none, and what it leaves in the results."""


def iterators_of_chunks(batches: Iterable[Any], num_microbatches: int, num_chunks: int) -> Any:
    """The micro-batches of one step as megatron-core's schedules want them: one iterator for each chunk.

    Args:
        batches: from which so many are taken.
        num_microbatches: of the step.
        num_chunks: virtual stages of a rank; with 1 there is one iterator, which is no list.
    """
    if num_chunks == 1:
        return batches
    return list(itertools.tee(itertools.islice(batches, num_microbatches), num_chunks))


def pass_forward(
    chunks: Sequence[Any],
    forward_step: Callable[[Iterator[Any], Any], tuple[Tensor, Callable[..., Any]]],
    batches: Iterable[Any],
    num_microbatches: int,
    *,
    seq_length: int,
    micro_batch_size: int,
    **more: Any,
) -> list[Any]:
    """Send micro-batches through the pipeline; all of its ranks call it together.

    Args:
        chunks: this rank's part of the model, a module for each of its virtual stages.
        forward_step: as megatron-core's schedules call it.
        batches: an iterator over at least so many micro-batches.
        num_microbatches: the same on all ranks of the pipeline.
        seq_length: tokens of a sequence, sinks included, over all ranks that share it.
        micro_batch_size: sequences of a micro-batch, as tensors between stages have them.
        more: further arguments of the schedule.

    Returns:
        What the loss functions gave, on ranks of the last stage; an empty list elsewhere.
    """
    arguments = {"seq_length": seq_length, "micro_batch_size": micro_batch_size, "forward_only": True, **more}
    if len(chunks) == 1:
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=list(chunks),
            num_microbatches=num_microbatches,
            **arguments,
        )
        return results
    if num_microbatches == 0:
        return []
    config = get_model_config(chunks[0])
    ranks = parallel_state.get_pipeline_model_parallel_world_size()
    lacking = -num_microbatches % ranks
    slices = config.context_parallel_size
    slices *= config.tensor_model_parallel_size if config.sequence_parallel else 1
    shape = (seq_length // slices, micro_batch_size, config.hidden_size)

    def step(iterator: Iterator[Any], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(iterator)
        if batch is not _FILLER:
            return forward_step(itertools.chain((batch,), iterator), chunk)
        device = next(chunk.parameters()).device
        return torch.zeros(shape, dtype=config.pipeline_dtype, device=device), _nothing

    filled = itertools.chain(itertools.islice(batches, num_microbatches), itertools.repeat(_FILLER, lacking))
    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators_of_chunks(filled, num_microbatches + lacking, len(chunks)),
        model=list(chunks),
        num_microbatches=num_microbatches + lacking,
        **arguments,
    )
    return [result for result in results if result is not _FILLER]


def _nothing(output: Tensor, non_loss_data: bool = False) -> Any:
    if non_loss_data:
        return _FILLER
    return output.new_zeros(()), output.new_zeros((), dtype=torch.int), _FILLER
