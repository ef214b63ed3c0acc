"""Context-parallel delta rule and convolution against whole sequences on one rank, in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.ops.gated_delta_rule import gated_delta_rule
from spikingbrain_train.ops.l2_norm import l2_norm
from spikingbrain_train.parallel.context_parallel.causal_convolution import (
    context_parallel_causal_convolution,
)
from spikingbrain_train.parallel.context_parallel.delta_rule import context_parallel_delta_rule
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.pool import RankPool
from tests.parallel.context_parallel.test_linear_attention import (
    METHODS,
    SCALE,
    TOLERANCE,
    Case,
    random_cases,
)

NAMES = ("o", "q", "k", "v", "log_gate", "beta")
TAPS = 4


def inputs_of(case: Case) -> list[Tensor]:
    """q, k, v, log_gate, beta over the whole sequence and the weights of the outputs in the loss."""
    q, k, v, log_gate, o_weight = case.inputs()
    beta = torch.rand(log_gate.shape[:3], dtype=torch.float64)
    return [l2_norm(q), l2_norm(k), v, log_gate[..., 0].contiguous(), beta, o_weight]


def whole_sequence(case: Case) -> list[Tensor]:
    """Output and gradients: the recurrence row by row and document by document, as they are visible."""
    *inputs, o_weight = inputs_of(case)
    leaves, rows, sinks = [x.requires_grad_() for x in inputs], [], case.num_sink_tokens
    run = partial(gated_delta_rule, scale=SCALE, output_final_state=True, backend="naive")
    for row in range(case.num_rows):
        tokens = [x[row : row + 1] for x in leaves]
        outputs, state = [], None
        if sinks:
            o, state = run(*(x[:, :sinks] for x in tokens))
            if case.sinks_are_padding:
                o, state = torch.zeros_like(o), None
            outputs.append(o)
        bounds = (0, case.text_length) if case.cu_seqlens is None else case.cu_seqlens[row]
        for start, end in zip(bounds, bounds[1:], strict=False):
            document = (x[:, sinks + start : sinks + end] for x in tokens)
            outputs.append(run(*document, initial_state=state)[0])
        rows.append(torch.cat(outputs, dim=1))
    o = torch.cat(rows)
    return [o.detach(), *torch.autograd.grad((o * o_weight).sum(), leaves)]


def _slices(groups: ProcessGroups, cases: list[Case], recompute: bool) -> dict[str, list[list[Tensor]]]:
    """Per method and case: output and gradients of this rank's slice."""
    cp_group = groups.collection.cp
    rank, size = cp_group.rank(), cp_group.size()
    results: dict[str, list[list[Tensor]]] = {method.value: [] for method in METHODS}
    for method in METHODS:
        for case in cases:
            *inputs, o_weight = (x.chunk(size, dim=1)[rank] for x in inputs_of(case))
            leaves = [x.clone().requires_grad_() for x in inputs]
            mixer = partial(
                context_parallel_delta_rule,
                layout=case.layout(rank, size),
                cp_group=cp_group,
                method=method,
                scale=SCALE,
                backend="chunk",
            )
            o = checkpoint(mixer, *leaves, use_reentrant=False) if recompute else mixer(*leaves)
            (o * o_weight).sum().backward()
            results[method.value].append([o.detach(), *(x.grad for x in leaves)])
    return results


def assert_equal_to_whole_sequence(
    ranks: RankPool, cases: list[Case], world_size: int, recompute: bool = False
) -> None:
    parallel = ParallelConfig(context_parallel_size=world_size)
    slices = ranks.run(_slices, cases, recompute, world_size=world_size, parallel=parallel)
    for index, case in enumerate(cases):
        expected = whole_sequence(case)
        for method in METHODS:
            parts = [of_rank[method.value][index] for of_rank in slices]
            gathered = [torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)]
            for name, actual, exact in zip(NAMES, gathered, expected, strict=True):
                # Where no state survives, the exact gradient of the gates is zero.
                error = ((actual - exact).norm() / exact.norm().clamp_min(1e-3)).item()
                assert error <= TOLERANCE, (method.value, name, error, case)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_slices_equal_the_recurrence_over_random_documents(ranks: RankPool, world_size: int) -> None:
    cases = [case for seed in range(3) for case in random_cases(world_size, seed)]
    assert_equal_to_whole_sequence(ranks, cases, world_size)


def test_transitions_of_four_slices_compose(ranks: RankPool) -> None:
    cases = [
        Case(600, num_rows=2, gate="weak"),  # chunks inside a slice, and memory over all of them
        Case(597, num_sink_tokens=3, cu_seqlens=((0, 250, 260, 597),), gate="weak"),
        Case(597, num_sink_tokens=3, gate="weak"),
        Case(600, cu_seqlens=((0, 80, 600), (0, 500, 600)), num_rows=2, gate="strong"),
        Case(45, num_sink_tokens=3, num_rows=2, num_heads=9, num_groups=3, gate="weak"),
        Case(16, cu_seqlens=(tuple(range(17)),)),  # every document is one token
    ]
    assert_equal_to_whole_sequence(ranks, cases[:4], 3)
    assert_equal_to_whole_sequence(ranks, cases[4:], 4)


def test_activations_can_be_computed_again(ranks: RankPool) -> None:
    cases = [Case(21, num_sink_tokens=3, cu_seqlens=((0, 2, 19, 21),)), Case(21)]
    assert_equal_to_whole_sequence(ranks, cases, 3, recompute=True)


def convolution_inputs(case: Case) -> list[Tensor]:
    """x over the whole sequence, kernels, and the weights of the outputs in the loss."""
    torch.manual_seed(case.text_length)
    shape = (case.num_rows, case.num_sink_tokens + case.text_length, 5)
    x, y_weight = torch.randn(2, *shape, dtype=torch.float64)
    return [x, torch.randn(5, TAPS, dtype=torch.float64), y_weight]


def convolved(case: Case) -> list[Tensor]:
    """Output and gradients by torch's convolution, of sinks and of every document by itself."""
    x, weight, y_weight = convolution_inputs(case)
    leaves, sinks, rows = [x.requires_grad_(), weight.requires_grad_()], case.num_sink_tokens, []
    for row in range(case.num_rows):
        bounds = (0, case.text_length) if case.cu_seqlens is None else case.cu_seqlens[row]
        ends = [0, *(sinks + bound for bound in bounds)] if sinks else [*bounds]
        rows.append(
            torch.cat(
                [
                    F.conv1d(F.pad(x[row, start:end].t(), (TAPS - 1, 0)), weight.unsqueeze(1), groups=5).t()
                    for start, end in zip(ends, ends[1:], strict=False)
                ]
            )
        )
    y = torch.stack(rows)
    return [y.detach(), *torch.autograd.grad((y * y_weight).sum(), leaves)]


def _convolved_slices(groups: ProcessGroups, cases: list[Case]) -> list[list[Tensor]]:
    cp_group = groups.collection.cp
    rank, size, results = cp_group.rank(), cp_group.size(), []
    for case in cases:
        x, weight, y_weight = convolution_inputs(case)
        x, y_weight = (each.chunk(size, dim=1)[rank] for each in (x, y_weight))
        leaves = [x.clone().requires_grad_(), weight.requires_grad_()]
        layout = case.layout(rank, size)
        y = context_parallel_causal_convolution(
            *leaves, None, layout=layout, cp_group=cp_group, sees_sinks=False
        )
        (y * y_weight).sum().backward()
        results.append([y.detach(), *(each.grad for each in leaves)])  # type: ignore[misc]
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_convolution_reaches_over_slices_and_not_over_documents(ranks: RankPool, world_size: int) -> None:
    cases = [case for seed in range(3) for case in random_cases(world_size, seed)]
    if world_size == 4:  # kernels longer than a slice
        cases += [Case(8), Case(7, num_sink_tokens=1, cu_seqlens=((0, 1, 7), (0, 7)), num_rows=2)]
    parallel = ParallelConfig(context_parallel_size=world_size)
    slices = ranks.run(_convolved_slices, cases, world_size=world_size, parallel=parallel)
    for index, case in enumerate(cases):
        y, grad_x, grad_weight = convolved(case)
        torch.testing.assert_close(torch.cat([of_rank[index][0] for of_rank in slices], dim=1), y)
        torch.testing.assert_close(torch.cat([of_rank[index][1] for of_rank in slices], dim=1), grad_x)
        torch.testing.assert_close(sum(of_rank[index][2] for of_rank in slices), grad_weight)
