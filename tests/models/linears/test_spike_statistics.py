"""Statistics of spike counts against counting by hand."""

from __future__ import annotations

import math

import pytest
import torch

from spikingbrain_train.models.linears.linear_transform import LinearTransform
from spikingbrain_train.models.linears.spike_statistics import NUM_BINS, SpikeStatistics


def brute_force(counts: list[int], steps: int) -> tuple[float, float]:
    """Mean spikes and window sparsity, bit by bit."""
    spikes = sum(bin(abs(c)).count("1") for c in counts) / len(counts)
    slots = [(abs(c) >> t) & 1 for c in counts for t in range(steps)]
    return spikes, 1 - sum(slots) / len(slots)


def test_shares_spikes_and_sparsity_are_those_counted_bit_by_bit() -> None:
    counts = torch.randint(-40, 41, (500,), generator=torch.Generator().manual_seed(0))
    statistics = SpikeStatistics()
    for part in counts.float().split(77):  # streaming in uneven parts, as floats
        statistics.add(part)
    values = counts.tolist()
    for limit in (0, 7, 16):
        expected = sum(abs(c) <= limit for c in values) / len(values)
        assert statistics.share_up_to(limit) == pytest.approx(expected)
    for steps in (1, 3, 6):
        mean_spikes, sparsity = brute_force(values, steps)
        assert statistics.mean_spikes() == pytest.approx(mean_spikes)
        assert statistics.sparsity(steps) == pytest.approx(sparsity)


def test_histograms_of_ranks_add_up() -> None:
    parts = torch.arange(-10, 14).chunk(2)
    one, two, both = SpikeStatistics(), SpikeStatistics(), SpikeStatistics()
    one.add(parts[0])
    two.add(parts[1])
    both.add(torch.cat(parts))
    assert torch.equal(one.histogram + two.histogram, both.histogram)


def test_huge_counts_fall_into_the_last_bin() -> None:
    statistics = SpikeStatistics()
    statistics.add(torch.tensor([1e9, -NUM_BINS, NUM_BINS - 2]))
    assert statistics.histogram[-1] == 2 and statistics.histogram[-2] == 1


def test_no_tokens_are_no_statistics() -> None:
    statistics = SpikeStatistics()
    statistics.add(torch.empty(0, 8))
    assert math.isnan(statistics.share_up_to(7)) and math.isnan(statistics.sparsity())


def test_a_few_tokens_of_the_next_input_are_counted_and_spread_over_it() -> None:
    transform = LinearTransform()
    x, sums = torch.arange(20.0).view(5, 2, 2), torch.arange(10.0).view(5, 2, 1)
    everything, _ = transform.counted(x, sums)
    assert torch.equal(everything, x.view(10, 2))  # without a limit, as in evaluations
    transform.tokens_to_count = 3
    tokens, of_tokens = transform.counted(x, sums)
    assert tokens.tolist() == [[0, 1], [6, 7], [12, 13]] and of_tokens.tolist() == [[0], [3], [6]]
    assert len(transform.counted(x)[0]) == 0  # enough
    transform.tokens_to_count = 20
    assert len(transform.counted(x)[0]) == 10 and transform.tokens_to_count == 10  # a short input
