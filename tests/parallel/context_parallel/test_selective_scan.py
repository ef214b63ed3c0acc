"""Context-parallel convolution and selective scan against both over whole sequences, in float64.

The convolution's output is the scan's input, as in a Mamba layer, so that the backward passes of both
communicate in one graph.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spikingbrain_train.architecture.sequence_layout import DocumentBounds, SequenceLayout
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.ops.causal_convolution import naive_causal_convolution
from spikingbrain_train.ops.selective_scan import selective_scan
from spikingbrain_train.parallel.context_parallel.causal_convolution import (
    context_parallel_causal_convolution,
)
from spikingbrain_train.parallel.context_parallel.selective_scan import context_parallel_selective_scan
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.pool import RankPool

D, N = 5, 3
# The project's bound. Rounding of float64 over a few dozen tokens stays orders of magnitude below it.
TOLERANCE = 1e-9
NAMES = ("y", "x", "dt", "B", "C")


@dataclass(frozen=True)
class Case:
    """Sequences of one micro-batch."""

    text_length: int
    num_sink_tokens: int = 0
    cu_seqlens: tuple[DocumentBounds, ...] | None = None
    num_rows: int = 1
    sinks_are_padding: bool = False
    width: int = 4
    strongest_step: float = 1.0

    def layout(self, rank: int = 0, size: int = 1) -> SequenceLayout:
        return SequenceLayout(
            self.text_length, self.num_sink_tokens, rank, size, self.cu_seqlens, self.sinks_are_padding
        )

    def inputs(self) -> list[Tensor]:
        """x, dt, B, C over the whole sequence, and the weights of the outputs in the loss."""
        torch.manual_seed(self.text_length)
        shape = (self.num_rows, self.num_sink_tokens + self.text_length)
        x, B, C, weight = (torch.randn(*shape, size).double() for size in (D, N, N, D))
        return [x, self.strongest_step * torch.rand(*shape, D).double(), B, C, weight]

    def weights(self) -> list[Tensor]:
        """A, D, and the kernels and the bias of the convolution."""
        torch.manual_seed(1)
        A = -torch.arange(1, N + 1).double().repeat(D, 1)
        return [A, torch.randn(D).double(), torch.randn(D, self.width).double(), torch.randn(D).double()]


def random_cases(size: int, seed: int) -> list[Case]:
    """Sequences that ``size`` ranks can split; slices may be shorter than the kernel."""
    rng = random.Random(seed)
    cases = []
    for num_sink_tokens in (0, 0, 1, 3, 5):
        slice_length = num_sink_tokens + rng.randint(1, 6)
        text_length = size * slice_length - num_sink_tokens
        num_rows = rng.randint(1, 2)
        rows = []
        for _ in range(num_rows):
            ends = rng.sample(range(1, text_length), rng.randint(0, min(6, text_length - 1)))
            rows.append((0, *sorted(ends), text_length))
        for cu_seqlens in (None, tuple(rows)):
            padding = num_sink_tokens > 0 and rng.random() < 0.4
            width, step = rng.choice([1, 2, 4, 5]), rng.choice([1.0, 50.0])
            cases.append(Case(text_length, num_sink_tokens, cu_seqlens, num_rows, padding, width, step))
    return cases


def whole_sequence(case: Case) -> list[Tensor]:
    """Output and gradients: naive forms row by row, document by document, as the rules of visibility say."""
    *inputs, y_weight = case.inputs()
    leaves = [each.requires_grad_() for each in inputs]
    A, skip, kernel, bias = weights = [each.requires_grad_() for each in case.weights()]

    def mix(
        tokens: list[Tensor], conv_state: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x, dt, B, C = tokens
        x, conv_state = naive_causal_convolution(x, kernel, bias, conv_state)
        y, state = selective_scan(
            x, dt, A, B, C, D=skip, initial_state=state, output_final_state=True, backend="naive"
        )
        return y, conv_state, state

    rows = []
    for row in range(case.num_rows):
        tokens = [each[row : row + 1] for each in leaves]
        sinks, empty = case.num_sink_tokens, torch.zeros(1, case.width - 1, D).double()
        outputs, conv_state, state = [], empty, None
        if sinks:
            y, conv_state, state = mix([each[:, :sinks] for each in tokens], empty, None)
            if case.sinks_are_padding:
                y, conv_state, state = torch.zeros_like(y), empty, None
            outputs.append(y)
        bounds = (0, case.text_length) if case.cu_seqlens is None else case.cu_seqlens[row]
        for start, end in pairwise(bounds):
            outputs.append(mix([x[:, sinks + start : sinks + end] for x in tokens], conv_state, state)[0])
        rows.append(torch.cat(outputs, dim=1))
    y = torch.cat(rows)
    return [y.detach(), *torch.autograd.grad((y * y_weight).sum(), [*leaves, *weights])]


def _slices(groups: ProcessGroups, cases: list[Case], recompute: bool) -> list[list[Tensor]]:
    """Per case: output and gradients of this rank's slice, and its parts of the gradients of weights."""
    cp_group = groups.collection.cp
    rank, size = cp_group.rank(), cp_group.size()
    results = []
    for case in cases:
        layout = case.layout(rank, size)
        *inputs, y_weight = (each.chunk(size, dim=1)[rank] for each in case.inputs())
        leaves = [each.clone().requires_grad_() for each in inputs]
        weights = [each.requires_grad_() for each in case.weights()]

        def mixer(
            x: Tensor, dt: Tensor, B: Tensor, C: Tensor, layout: SequenceLayout, weights: list[Tensor]
        ) -> Tensor:
            A, skip, kernel, bias = weights
            x = context_parallel_causal_convolution(
                x, kernel, bias, layout=layout, cp_group=cp_group, sees_sinks=True
            )
            return context_parallel_selective_scan(
                x, dt, A, B, C, skip, layout=layout, cp_group=cp_group, backend="chunk"
            )

        arguments = (*leaves, layout, weights)
        y = checkpoint(mixer, *arguments, use_reentrant=False) if recompute else mixer(*arguments)
        (y * y_weight).sum().backward()
        results.append([y.detach(), *(each.grad for each in leaves), *(each.grad for each in weights)])
    return results


def assert_equal_to_whole_sequence(
    ranks: RankPool, cases: list[Case], world_size: int, recompute: bool = False
) -> None:
    parallel = ParallelConfig(context_parallel_size=world_size)
    of_ranks = ranks.run(_slices, cases, recompute, world_size=world_size, parallel=parallel)
    for index, case in enumerate(cases):
        parts = list(zip(*(of_rank[index] for of_rank in of_ranks), strict=True))
        slices = [torch.cat(each, dim=1) for each in parts[: len(NAMES)]]
        weights = [torch.stack(each).sum(0) for each in parts[len(NAMES) :]]
        names = (*NAMES, "A", "D", "kernel", "bias")
        for name, actual, exact in zip(names, [*slices, *weights], whole_sequence(case), strict=True):
            # Where no state survives, the exact gradient of the decays is zero.
            error = ((actual - exact).norm() / exact.norm().clamp_min(1e-3)).item()
            assert error <= TOLERANCE, (name, error, case)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_slices_equal_whole_sequences_over_random_documents(ranks: RankPool, world_size: int) -> None:
    cases = [case for seed in range(4) for case in random_cases(world_size, seed)]
    assert_equal_to_whole_sequence(ranks, cases, world_size)


def test_kernels_reach_over_ranks_and_into_the_sinks(ranks: RankPool) -> None:
    cases = [
        Case(4, width=4),  # slices of one token: a kernel reaches over three ranks
        Case(8, cu_seqlens=((0, 3, 8), (0, 1, 8)), num_rows=2, width=5),
        Case(13, num_sink_tokens=3, cu_seqlens=((0, 1, 5, 9, 13),)),  # edges of slices are at 1, 5 and 9
        Case(14, num_sink_tokens=2, cu_seqlens=((0, 1, 14), (0, 2, 14)), num_rows=2, width=5),
    ]
    assert_equal_to_whole_sequence(ranks, cases, 4)


def test_recomputation_communicates_again(ranks: RankPool) -> None:
    cases = [Case(13, num_sink_tokens=3, cu_seqlens=((0, 4, 13), (0, 7, 13)), num_rows=2), Case(16)]
    assert_equal_to_whole_sequence(ranks, cases, 4, recompute=True)
