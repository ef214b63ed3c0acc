"""Every part of both architectures computes the same loss and gradients on any topology as on one rank.

All in float32. Tolerance 1e-5 of a tensor's largest gradient: splitting a sum over ranks changes its rounding
(6e-8 a term), and a backward pass through a few layers amplifies that by less than a hundred.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from spikingbrain_train.config.parallel import (
    ContextParallelConfig,
    LinearAttentionContextParallel,
    ParallelConfig,
    SlidingWindowContextParallel,
)
from tests.distributed.gradients import CASES, Case, assemble, loss_and_gradients
from tests.distributed.pool import RankPool

TOLERANCE = 1e-5

ALLGATHER_HALO = ContextParallelConfig()
ALLSCAN_ULYSSES = ContextParallelConfig(
    gated_linear_attention=LinearAttentionContextParallel.allscan,
    sliding_window_attention=SlidingWindowContextParallel.ulysses,
)
ULYSSES = ContextParallelConfig(
    gated_linear_attention=LinearAttentionContextParallel.ulysses,
    sliding_window_attention=SlidingWindowContextParallel.ulysses,
)

TOPOLOGIES: dict[str, ParallelConfig] = {
    "TP 2": ParallelConfig(tensor_model_parallel_size=2),
    "TP 2 + sequence parallel": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "PP 2": ParallelConfig(pipeline_model_parallel_size=2),
    "PP 2 of 2 virtual stages": ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    ),
    "EP 2": ParallelConfig(expert_model_parallel_size=2),
    "CP 2, all-gather and halo": ParallelConfig(context_parallel_size=2, context_parallel=ALLGATHER_HALO),
    "CP 2, all-scan and Ulysses": ParallelConfig(context_parallel_size=2, context_parallel=ALLSCAN_ULYSSES),
    "CP 4, all-gather and halo": ParallelConfig(context_parallel_size=4, context_parallel=ALLGATHER_HALO),
    "CP 4, all-scan and Ulysses": ParallelConfig(context_parallel_size=4, context_parallel=ALLSCAN_ULYSSES),
    "CP 4, Ulysses in every mixer": ParallelConfig(context_parallel_size=4, context_parallel=ULYSSES),
    "TP 2 + sequence parallel x CP 2": ParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        context_parallel_size=2,
        context_parallel=ALLSCAN_ULYSSES,
    ),
    "PP 2 x EP 2": ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2),
    "EP 2 x CP 2": ParallelConfig(
        expert_model_parallel_size=2, context_parallel_size=2, context_parallel=ALLGATHER_HALO
    ),
}


def world_size(parallel: ParallelConfig) -> int:
    """The fewest ranks: EP is taken from data- and context-parallel ranks."""
    replicas = max(1, parallel.expert_model_parallel_size // parallel.context_parallel_size)
    return parallel.model_parallel_size * replicas


def as_met(case: str, parallel: ParallelConfig) -> ParallelConfig:
    """Without methods of mixers that the case has not: full attention and Mamba know one method each."""
    model = CASES[case].model
    mixers = {
        mixer
        for branches in model.mixers
        for mixer in ([branches] if isinstance(branches, str) else branches)
    }
    methods = parallel.context_parallel
    if not mixers & {"gla", "gdn"}:
        methods = replace(methods, gated_linear_attention=ALLGATHER_HALO.gated_linear_attention)
    if "swa" not in mixers:
        methods = replace(methods, sliding_window_attention=ALLGATHER_HALO.sliding_window_attention)
    return replace(parallel, context_parallel=methods)


def is_first(topology: str, case: str) -> bool:
    """Whether no topology before it computes the very same."""
    before = list(TOPOLOGIES)[: list(TOPOLOGIES).index(topology)]
    return as_met(case, TOPOLOGIES[topology]) not in [as_met(case, TOPOLOGIES[other]) for other in before]


def fits(case: str, parallel: ParallelConfig) -> bool:
    """Experts under tensor parallelism need sequence parallelism; EP needs experts, stages layers."""
    if CASES[case].model.num_layers % (parallel.pipeline_model_parallel_size * parallel.virtual_stages):
        return False
    has_experts = "moe" in CASES[case].model.feed_forwards
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        return not has_experts
    return has_experts or parallel.expert_model_parallel_size == 1


ON_FOUR_RANKS = (
    "GLA, options, packed documents",
    "GLA, fixed decay",
    "gated delta rule, options, packed documents",
    "gated delta rule, branches",
    "Mamba, norms and biases, sinks, packed documents",
    "parallel hybrid, drop-out of softmax branches",
    "softmax branches only, three branches",
    "MoE",
    "sub-norms, squared ReLU",
    "ReLU, experts, L1",
    "spiking",
    "ternary weights, INT8 inputs",
    "ternary experts, INT8 inputs, spikes",
    "adapters",
    "adapters beside Mamba and in it",
    "adapters beside ternary weights, INT8 inputs, spikes",
    "adapters of experts, one frozen",
    "FP8 in blocks of 32, experts, first layer in another format",
    "7B-like, packed documents",
    "76B-like",
    "76B-like, packed documents",
)
"""Between them every mixer, feed-forward and transform, and sinks; two ranks take all cases."""

PAIRS = [
    (topology, case)
    for topology, parallel in TOPOLOGIES.items()
    for case in (CASES if world_size(parallel) == 2 else ON_FOUR_RANKS)
    if fits(case, parallel) and is_first(topology, case)
]

Result = tuple[float, dict[str, torch.Tensor]]
"""Loss and whole gradients."""
Results = Callable[[str | None, str], Result]


def assert_equal(found: Result, of_one_rank: Result) -> None:
    """Hold loss and gradients to those of one rank."""
    (loss, gradients), (expected_loss, expected) = found, of_one_rank
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
    assert gradients.keys() == expected.keys()
    errors = {
        name: ((gradients[name] - expected[name]).abs().max() / expected[name].abs().max()).item()
        for name in expected
    }
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= TOLERANCE, f"{worst} differs by {errors[worst]:.2e} of its largest gradient"
    assert all(value.abs().max() > 0 for value in expected.values())


def result(ranks: RankPool, case: Case, parallel: ParallelConfig) -> Result:
    """Loss and gradients of a model in a topology."""
    per_rank = ranks.run(
        loss_and_gradients, case, parallel, world_size=world_size(parallel), parallel=parallel
    )
    losses = {loss for loss, _ in per_rank}
    assert len(losses) == 1, f"ranks report different losses {losses}"
    return losses.pop(), assemble([shards for _, shards in per_rank])


@pytest.fixture(scope="module")
def results(ranks: RankPool) -> Results:
    """``results(topology, case)``: loss and whole gradients; the topology None is one rank."""

    @cache
    def of(topology: str | None, case: str) -> Result:
        return result(ranks, CASES[case], ParallelConfig() if topology is None else TOPOLOGIES[topology])

    return of


@pytest.mark.parametrize(("topology", "case"), PAIRS, ids=[f"{case}: {topology}" for topology, case in PAIRS])
def test_loss_and_every_gradient_equal_those_of_one_rank(topology: str, case: str, results: Results) -> None:
    assert_equal(results(topology, case), results(None, case))


PIPELINES: dict[str, tuple[int, ParallelConfig]] = {
    "PP 2 of 2 uneven virtual stages": (
        5,
        ParallelConfig(
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
            pipeline_model_parallel_layout=[1, 2, 1, 1],
        ),
    ),
    "PP 2 of 2 virtual stages x CP 2": (
        4,
        ParallelConfig(
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
            context_parallel_size=2,
            context_parallel=ALLGATHER_HALO,
        ),
    ),
    "PP 4": (4, ParallelConfig(pipeline_model_parallel_size=4)),
    "PP 4, uneven": (
        6,
        ParallelConfig(pipeline_model_parallel_size=4, pipeline_model_parallel_layout=[1, 2, 2, 1]),
    ),
    "PP 4 of 2 virtual stages": (
        8,
        ParallelConfig(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2),
    ),
}
"""Number of layers and topology. Two stages have one neighbour each; those in the middle of four have two."""


OF_PIPELINES = [("76B-like, packed documents", topology) for topology in PIPELINES]
OF_PIPELINES += [("7B-like, packed documents", topology) for topology in ("PP 4", "PP 4, uneven")]


@pytest.mark.parametrize(
    ("case", "topology"), OF_PIPELINES, ids=[f"{case}: {topology}" for case, topology in OF_PIPELINES]
)
def test_pipelines_compute_what_one_rank_does(case: str, topology: str, ranks: RankPool) -> None:
    num_layers, parallel = PIPELINES[topology]
    model = replace(CASES[case].model, num_layers=num_layers, share_embeddings_and_output_weights=True)
    # Four micro-batches: the fewest that make four stages go forward and backward in turn.
    of_pipeline = Case(model, packed=True, micro_batch=1)

    assert_equal(result(ranks, of_pipeline, parallel), result(ranks, of_pipeline, ParallelConfig()))
