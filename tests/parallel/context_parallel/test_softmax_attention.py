"""Softmax attention over sequences split over ranks, against a masked softmax over the whole sequence.

All comparisons are in float64, where summing in another order costs less than 1e-12 of the largest value; the
bound of 1e-9 leaves room for nothing but that.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from spikingbrain_train.architecture.head_shares import head_shares
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.parallel import ParallelConfig, SlidingWindowContextParallel
from spikingbrain_train.parallel.context_parallel.halo_exchange import halo_lengths, tokens_sent
from spikingbrain_train.parallel.context_parallel.softmax_attention import context_parallel_softmax_attention
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.pool import RankPool

HALO, ULYSSES = SlidingWindowContextParallel.halo, SlidingWindowContextParallel.ulysses
BOUND = 1e-9


@dataclass(frozen=True)
class Case:
    """One call, the same on all ranks."""

    layout: SequenceLayout
    window: int | None
    method: SlidingWindowContextParallel | None
    num_heads: int = 4
    num_groups: int = 2
    rows: int = 1
    backend: str = "blocked"
    dtype: torch.dtype = torch.float64
    key_dim: int = 6
    value_dim: int = 5

    def tensors(self) -> list[Tensor]:
        """q, k, v and the gradient of the output for the whole sequence."""
        generator = torch.Generator().manual_seed(self.layout.text_length)
        tokens = self.layout.slice_length * self.layout.context_parallel_size
        shapes = [
            (self.num_heads, self.key_dim),
            (self.num_groups, self.key_dim),
            (self.num_groups, self.value_dim),
            (self.num_heads, self.value_dim),
        ]
        return [
            torch.randn(self.rows, tokens, *shape, generator=generator, dtype=torch.float64).to(self.dtype)
            for shape in shapes
        ]


def on_rank(groups: ProcessGroups, cases: list[Case]) -> list[list[Tensor]]:
    """Output and gradients of this rank's slice, case by case."""
    results = []
    for case in cases:
        layout = replace(case.layout, context_parallel_rank=groups.context_parallel_rank)
        start = layout.context_parallel_rank * layout.slice_length
        q, k, v, grad = (x[:, start : start + layout.slice_length] for x in case.tensors())
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = context_parallel_softmax_attention(
            *leaves,
            window=case.window,
            layout=layout,
            cp_group=groups.collection.cp,
            method=case.method,
            scale=case.key_dim**-0.5,
            backend=case.backend,
        )
        results.append([o.detach(), *torch.autograd.grad(o, leaves, grad)])
    return results


def visible_pairs(case: Case, row: int) -> Tensor:
    """The rules, one query after the other: boolean [tokens, tokens]."""
    layout, N = case.layout, case.layout.num_sink_tokens
    window = case.window or layout.text_length
    bounds = layout.bounds(row)
    mask = torch.zeros(N + layout.text_length, N + layout.text_length, dtype=torch.bool)
    if not layout.sinks_are_padding:
        mask[:, :N] = True
    for t in range(layout.text_length):
        document_start = max(bound for bound in bounds if bound <= t)
        mask[N + t, N + max(document_start, t - window + 1) : N + t + 1] = True
    return mask


def whole(case: Case) -> list[Tensor]:
    """Output and gradients of a masked softmax over whole sequences, in float64."""
    *inputs, grad = (x.double() for x in case.tensors())
    q, k, v = leaves = [x.clone().requires_grad_() for x in inputs]
    mask = torch.stack([visible_pairs(case, row) for row in range(case.rows)])
    heads = []
    for h in range(case.num_heads):
        group = h * case.num_groups // case.num_heads
        scores = q[:, :, h] @ k[:, :, group].transpose(1, 2) * case.key_dim**-0.5
        # A row that sees nothing (a padding sink) has zero output; softmax would say NaN.
        p = scores.masked_fill(~mask, -1e300).softmax(-1) * mask
        heads.append(p @ v[:, :, group])
    o = torch.stack(heads, dim=2)
    return [o.detach(), *torch.autograd.grad(o, leaves, grad)]


def largest_error(case: Case, of_ranks: list[list[Tensor]]) -> float:
    """Of output and gradients, in units of the largest expected value of all of them."""
    actual = [torch.cat(parts, dim=1) for parts in zip(*of_ranks, strict=True)]
    expected = whole(case)
    scale = max(e.abs().max().item() for e in expected)
    return max((a.double() - e).abs().max().item() for a, e in zip(actual, expected, strict=True)) / scale


def check(ranks: RankPool, world_size: int, cases: list[Case], bound: float = BOUND) -> None:
    parallel = ParallelConfig(context_parallel_size=world_size)
    results = ranks.run(on_rank, cases, world_size=world_size, parallel=parallel)
    for i, case in enumerate(cases):
        error = largest_error(case, [of_rank[i] for of_rank in results])
        assert error <= bound, f"{case} is off by {error}"


def sequences(
    world_size: int, slice_length: int, sinks: int = 0, documents: tuple[tuple[int, ...], ...] | None = None
) -> SequenceLayout:
    """Layout of the first rank; ``documents`` are the inner bounds of every row."""
    text = world_size * slice_length - sinks
    cu_seqlens = None if documents is None else tuple((0, *inner, text) for inner in documents)
    return SequenceLayout(text, sinks, 0, world_size, cu_seqlens)


@pytest.mark.parametrize("world_size", [2, 4])
def test_window_shorter_and_longer_than_a_slice(ranks: RankPool, world_size: int) -> None:
    cases = [
        Case(sequences(world_size, 20, sinks), window, method)
        for sinks in (0, 5)
        for window in (1, 7, 20, 21, 33, 50, 1000)
        for method in (HALO, ULYSSES)
    ]
    check(ranks, world_size, cases)


@pytest.mark.parametrize("world_size", [2, 4])
def test_full_attention(ranks: RankPool, world_size: int) -> None:
    check(
        ranks,
        world_size,
        [
            Case(sequences(world_size, 20, sinks), None, method, backend=backend)
            for sinks in (0, 5)
            for method in (None, HALO)
            for backend in ("blocked", "sdpa")
        ],
    )


@pytest.mark.parametrize(
    ("num_heads", "num_groups"), [(7, 1), (6, 2), (4, 4), (12, 3), (3, 3), (2, 1), (9, 3), (14, 2)]
)
def test_ulysses_where_heads_and_groups_do_not_divide(
    ranks: RankPool, num_heads: int, num_groups: int
) -> None:
    layout = sequences(4, 12, 3)
    check(
        ranks,
        4,
        [Case(layout, window, ULYSSES, num_heads, num_groups, rows=2) for window in (None, 17)],
    )


def random_case(generator: random.Random, world_size: int) -> Case:
    slice_length = generator.randint(6, 30)
    sinks = generator.choice([0, 0, 1, 4, slice_length - 2])
    rows = generator.choice([1, 2])
    text = world_size * slice_length - sinks
    documents = []
    for _ in range(rows):
        # Some bounds at the edges of slices, some anywhere.
        edges = [rank * slice_length - sinks for rank in range(1, world_size)]
        anywhere = [generator.randint(1, text - 1) for _ in range(generator.randint(0, 5))]
        chosen = {edge for edge in edges if generator.random() < 0.3} | set(anywhere)
        documents.append((0, *sorted(chosen), text))
    num_groups = generator.choice([1, 2, 3])
    return Case(
        SequenceLayout(
            text,
            sinks,
            0,
            world_size,
            None if generator.random() < 0.15 else tuple(documents),
            sinks_are_padding=generator.random() < 0.25,
        ),
        window=generator.choice([None, 1, generator.randint(2, 100), generator.randint(2, 20)]),
        method=generator.choice([HALO, HALO, ULYSSES]),
        num_heads=num_groups * generator.randint(1, 3),
        num_groups=num_groups,
        rows=rows,
        backend=generator.choice(["blocked", "sdpa", "naive"]),
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_random_documents_sinks_rows_and_windows(ranks: RankPool, world_size: int) -> None:
    generator = random.Random(world_size)
    check(ranks, world_size, [random_case(generator, world_size) for _ in range(40)])


def test_bfloat16_is_as_accurate_as_its_operands(ranks: RankPool) -> None:
    # One rounding is 2e-3; probabilities, outputs and what travels are rounded, and gradients are their sums.
    layout = sequences(4, 24, 6, ((50,),))
    check(
        ranks,
        4,
        [Case(layout, 40, method, num_heads=6, dtype=torch.bfloat16) for method in (HALO, ULYSSES)],
        bound=2e-2,
    )


def _without_gradients(groups: ProcessGroups, case: Case) -> Tensor:
    layout = replace(case.layout, context_parallel_rank=groups.context_parallel_rank)
    start = layout.context_parallel_rank * layout.slice_length
    q, k, v, _ = (x[:, start : start + layout.slice_length] for x in case.tensors())
    with torch.no_grad():
        return context_parallel_softmax_attention(
            q,
            k,
            v,
            window=case.window,
            layout=layout,
            cp_group=groups.collection.cp,
            method=case.method,
            scale=case.key_dim**-0.5,
            backend=case.backend,
        )


@pytest.mark.parametrize("method", [HALO, ULYSSES])
def test_evaluation_needs_no_gradients(ranks: RankPool, method: SlidingWindowContextParallel) -> None:
    case = Case(sequences(2, 16, 4), 10, method)
    parts = ranks.run(
        _without_gradients, case, world_size=2, parallel=ParallelConfig(context_parallel_size=2)
    )
    torch.testing.assert_close(torch.cat(parts, dim=1), whole(case)[0], rtol=0, atol=1e-12)


def test_without_a_layout_a_sequence_is_one_document() -> None:
    case = Case(SequenceLayout(30), 8, HALO, rows=2)
    q, k, v, _ = case.tensors()
    o = context_parallel_softmax_attention(
        q, k, v, window=8, layout=None, cp_group=None, method=HALO, scale=6**-0.5, backend="blocked"
    )
    torch.testing.assert_close(o, whole(case)[0], rtol=0, atol=1e-12)


def test_tensors_that_do_not_fit_the_layout_are_named() -> None:
    def call(layout: SequenceLayout) -> Tensor:
        x = torch.zeros(2, 30, 2, 4)
        return context_parallel_softmax_attention(
            x, x, x, window=8, layout=layout, cp_group=None, method=HALO, scale=1.0, backend="blocked"
        )

    with pytest.raises(ValueError, match="q has 30 tokens, the layout's slices have 29"):
        call(SequenceLayout(29))
    with pytest.raises(ValueError, match="lists the documents of 1 rows, q has 2"):
        call(SequenceLayout(30, cu_seqlens=((0, 30),)))
    with pytest.raises(ValueError, match="the layout is that of rank 0 of 2"):
        call(SequenceLayout(60, context_parallel_size=2))


def test_halo_is_what_windows_and_documents_reach() -> None:
    # Slices of 10 with 4 sinks: text 0-5, 6-15, 16-25, 26-35.
    layout = sequences(4, 10, 4)
    assert halo_lengths(layout, 1) == (0, 0, 0, 0)
    assert halo_lengths(layout, 8) == (0, 6, 7, 7)
    assert halo_lengths(layout, 13) == (0, 6, 12, 12)
    assert [tokens_sent(layout, 13, source, 2) for source in range(4)] == [2, 10, 0, 0]
    assert [tokens_sent(layout, 100, 0, target) for target in range(4)] == [0, 6, 6, 6]
    # One row's document begins at the edge of rank 2, the other's four tokens before it.
    layout = sequences(4, 10, 4, ((16,), (12,)))
    assert halo_lengths(layout, 8) == (0, 6, 4, 7)
    assert halo_lengths(sequences(4, 10, 4, ((16,), (6, 16))), 8) == (0, 6, 0, 7)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("num_heads", "num_groups"), [(28, 4), (40, 8), (7, 1), (6, 2), (32, 32), (9, 3)])
def test_every_head_is_shared_out_once_with_its_group(
    num_heads: int, num_groups: int, num_ranks: int
) -> None:
    shares = head_shares(num_heads, num_groups, num_ranks)
    assert [head for share in shares for head in share.heads] == list(range(num_heads))
    sizes = [len(share.heads) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    for share in shares:
        of_heads = [head // (num_heads // num_groups) for head in share.heads]
        assert [share.heads_of_groups[group - share.groups.start] for group in share.groups] == [
            of_heads.count(group) for group in share.groups
        ]
        assert sum(share.heads_of_groups) == len(share.heads)


def test_groups_travel_no_more_often_than_ranks_read_them() -> None:
    def groups(num_heads: int, num_groups: int, num_ranks: int) -> list[int]:
        return [len(share.groups) for share in head_shares(num_heads, num_groups, num_ranks)]

    assert groups(28, 4, 8) == [1] * 8  # ranks share a group, none gets two
    assert groups(28, 4, 4) == [1] * 4
    assert groups(28, 4, 2) == [2] * 2
    assert groups(40, 8, 4) == [2] * 4
    assert [len(share.heads) for share in head_shares(7, 1, 2)] == [3, 4]
    assert [share.heads_of_groups for share in head_shares(6, 3, 2)] == [(2, 1), (1, 2)]
