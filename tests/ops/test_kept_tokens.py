"""What is kept of a teacher's distribution stands for all of it, on any number of ranks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

from spikingbrain_train.ops import kept_tokens as module
from spikingbrain_train.ops.kept_tokens import VocabularyShare, kept_tokens

N, D, V, TOP, DRAWN = 11, 8, 61, 7, 5


@pytest.fixture
def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_likeliest_tokens_keep_their_probabilities(
    problem: tuple[Tensor, Tensor], temperature: float
) -> None:
    hidden, weight = problem
    ids, log_probabilities, tail = kept_tokens(
        hidden, weight, torch.zeros(N), top=TOP, drawn=DRAWN, temperature=temperature
    )
    expected = (hidden @ weight.t() / temperature).log_softmax(1)
    values, order = expected.topk(TOP, 1)
    assert torch.equal(ids[:, :TOP], order)
    torch.testing.assert_close(log_probabilities, expected.gather(1, ids))
    torch.testing.assert_close(tail, 1 - values.exp().sum(1))
    assert not (ids[:, TOP:, None] == ids[:, None, :TOP]).any(), "what is drawn is of the tail"


def test_sums_over_the_tail_are_unbiased(problem: tuple[Tensor, Tensor]) -> None:
    hidden, weight = problem
    quantity = torch.randn(V, generator=torch.Generator().manual_seed(5))
    probabilities = (hidden @ weight.t()).softmax(1)
    below = probabilities.scatter(1, probabilities.topk(TOP, 1).indices, 0.0)
    times = 10_000  # all offsets alike: the mean over them is the expectation, up to this grid
    offsets = ((torch.arange(times) + 0.5) / times).repeat(N)
    repeated = hidden.repeat_interleave(times, dim=0)
    ids, _, tail = kept_tokens(repeated, weight, offsets, top=TOP, drawn=DRAWN)
    found = (tail * quantity[ids[:, TOP:]].mean(1)).view(N, times).mean(1)
    torch.testing.assert_close(found, below @ quantity, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "cuts", [[20], [7, 40], [V]], ids=["two ranks", "three ranks", "a rank without rows"]
)
def test_ranks_with_parts_of_the_vocabulary_agree_with_one(
    problem: tuple[Tensor, Tensor], cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight = problem
    offsets = torch.rand(N, generator=torch.Generator().manual_seed(1))
    whole = kept_tokens(hidden, weight, offsets, top=TOP, drawn=DRAWN)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 0)  # a token at a time, on every rank
    starts, stops = [0, *cuts], [*cuts, V]
    barrier = threading.Barrier(len(starts), timeout=30)
    parts: list[Tensor] = [torch.empty(0)] * len(starts)

    def gather(rank: int, x: Tensor) -> Tensor:
        parts[rank] = x
        barrier.wait()
        gathered = torch.stack(parts)
        barrier.wait()
        return gathered

    def run(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        share = VocabularyShare(starts[rank], rank, partial(gather, rank))
        rows = weight[starts[rank] : stops[rank]]
        return kept_tokens(hidden, rows, offsets, top=TOP, drawn=DRAWN, share=share)

    with ThreadPoolExecutor(len(starts)) as pool:
        for ids, log_probabilities, tail in pool.map(run, range(len(starts))):
            assert torch.equal(ids, whole[0])
            torch.testing.assert_close(log_probabilities, whole[1])
            torch.testing.assert_close(tail, whole[2])
