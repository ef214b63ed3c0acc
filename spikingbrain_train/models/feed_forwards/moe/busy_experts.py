"""Recomputation of those experts alone that got many tokens (SpikingBrain, arXiv 2509.05276, section 4.1).

What an expert keeps for the backward pass grows with its tokens, so that one rank of an unbalanced step can
run out of memory where all others have half of theirs left. An expert that got more than
``parallel.recompute_expert_tokens`` keeps its input alone.

torch's own checkpoint is used, not megatron-core's: its backward pass stays in one graph. A weight of a
grouped GEMM that has a part in both halves then gets one gradient and not two, which data parallelism would
take for the whole when the first of them arrives; and an expert whose input needs no gradient still learns.
It also ends as soon as everything is there that the backward pass needs, ahead of the second projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spikingbrain_train.models.feed_forwards.gated_activation import activations_in
from spikingbrain_train.models.linears.linear_transform import HasTransforms


def computed_again(experts: torch.nn.Module, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``, of which nothing but the inputs is kept until the backward pass.

    The second time it draws the same random numbers, and nothing is counted again.

    Args:
        experts: the module that computes it.
        function: of the inputs; has weights of ``experts``.
        inputs: tensors of any shape.
    """
    drawn = get_cuda_rng_tracker().get_states()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _second_time(experts, drawn)

    output: Tensor = checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)
    return output


@contextmanager
def _second_time(experts: torch.nn.Module, drawn: dict[str, Tensor]) -> Iterator[None]:
    """The model-parallel generators as they were; torch's checkpoint sees to the others."""
    tracker = get_cuda_rng_tracker()
    now = tracker.get_states()
    with ExitStack() as stack:
        stack.callback(tracker.set_states, now)
        tracker.set_states(drawn)
        stack.enter_context(_uncounted(experts))
        yield


@contextmanager
def _uncounted(experts: torch.nn.Module) -> Iterator[None]:
    transforms = [
        each
        for module in experts.modules()
        if isinstance(module, HasTransforms)
        for each in module.transforms.values()
    ]
    collected = [each.statistics for each in transforms]
    activations = activations_in(experts)
    for transform in transforms:
        transform.statistics = None
    for activation in activations:
        activation.is_repeated = True
    try:
        yield
    finally:
        for transform, statistics in zip(transforms, collected, strict=True):
            transform.statistics = statistics
        for activation in activations:
            activation.is_repeated = False


Grouped = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""Experts on tokens that are sorted by expert, as megatron-core calls them."""


def in_two_groups(
    grouped: Grouped,
    again: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden: Tensor,
    tokens_per_expert: Tensor,
    probs: Tensor,
    most_tokens: int,
) -> Tensor:
    """Experts that share a grouped GEMM: those with few tokens in one, those to compute again in another.

    Args:
        grouped: computes all experts of the rank, of which some may have no tokens.
        again: the same, and keeps nothing but its inputs.
        hidden: [tokens, hidden_size], sorted by expert.
        tokens_per_expert: [local experts] int64, on the CPU.
        probs: [tokens] float32.
        most_tokens: of an expert that keeps its activations.

    Returns:
        [tokens, hidden_size], in the order of ``hidden``.
    """
    busy = tokens_per_expert > most_tokens
    if not busy.any():
        return grouped(hidden, tokens_per_expert, probs)[0]
    if not tokens_per_expert[~busy].any():
        return again(hidden, tokens_per_expert, probs)
    sizes, is_busy = tokens_per_expert.tolist(), busy.tolist()

    def of(group: bool, tokens: Tensor) -> Tensor:
        pieces = zip(tokens.split(sizes), is_busy, strict=True)
        return torch.cat([piece for piece, each in pieces if each is group])

    outputs = {
        False: grouped(of(False, hidden), tokens_per_expert * ~busy, of(False, probs))[0],
        True: again(of(True, hidden), tokens_per_expert * busy, of(True, probs)),
    }
    sizes_of = {
        group: [size for size, each in zip(sizes, is_busy, strict=True) if each is group] for group in outputs
    }
    pieces = {group: iter(output.split(sizes_of[group])) for group, output in outputs.items()}
    return torch.cat([next(pieces[each]) for each in is_busy])
