"""What a histogram says of each coding against trains of spikes, slot by slot."""

from __future__ import annotations

import math

import pytest
import torch

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.spiking.codings import CODINGS, Coding
from spikingbrain_train.spiking.count_distribution import LARGEST, CountDistribution
from spikingbrain_train.spiking.energy import EnergyModel


@pytest.mark.parametrize("coding", CODINGS.values(), ids=list(CODINGS))
@pytest.mark.parametrize("window", [1, 3, 5])
def test_sparsity_spikes_and_what_is_carried_are_those_of_the_trains(coding: Coding, window: int) -> None:
    low = -12 if coding.has_negative else 0
    counts = torch.randint(low, 13, (400,), generator=torch.Generator().manual_seed(1))
    distribution = CountDistribution()
    for part in counts.float().split(150):
        distribution.add(part)
    found = distribution.of(coding, window)
    train = coding.encode(counts)
    assert found.steps == len(train.spikes)
    assert found.mean_spikes == pytest.approx(train.num_spikes / 400)
    first = train.spikes[:window]
    assert found.sparsity == pytest.approx(1 - int(first.count_nonzero()) / (400 * window))
    low, high = coding.holds(window)
    assert found.carried == pytest.approx(sum(low <= c <= high for c in counts.tolist()) / 400)


def test_a_coding_that_does_not_hold_negative_counts_says_what_it_leaves_out() -> None:
    distribution = CountDistribution()
    distribution.add(torch.tensor([-2, -1, 0, 1, 2, 9]))
    unsigned = distribution.of(CODINGS["bitwise_unsigned"], 3)
    assert unsigned.mean_spikes is None and unsigned.steps is None
    assert unsigned.carried == pytest.approx(3 / 6)
    assert unsigned.sparsity == pytest.approx(1 - 3 / 18)  # of 1, 2 and the lowest bit of 9


def test_shares_occurrences_and_what_is_beyond_all_bins() -> None:
    distribution = CountDistribution()
    assert math.isnan(distribution.share_up_to(7)) and distribution.occurrences() == (0, [0])
    distribution.add(torch.tensor([[-3.0, 0.0], [8.0, 8.0]]))
    assert (
        distribution.total == 4 and distribution.share_up_to(0) == 0.25 and distribution.share_up_to(7) == 0.5
    )
    low, occurrences = distribution.occurrences()
    assert low == -3 and occurrences == [1, 0, 0, 1, *[0] * 7, 2]
    distribution.add(torch.tensor([10**9, -(10**9)]))
    assert distribution.bounds() == (-LARGEST, LARGEST)


def test_the_paper_s_energies() -> None:
    """1.13 spikes are 0.034 pJ: 97.7 % less than FP16, 85.2 % less than INT8."""
    energy = EnergyModel()
    assert energy.of_spikes(1.13) == pytest.approx(0.034, abs=5e-4)
    assert energy.saving(1.13, energy.fp16_mac) == pytest.approx(0.977, abs=5e-4)
    assert energy.saving(1.13, energy.int8_mac) == pytest.approx(0.852, abs=1e-3)
    with pytest.raises(ConfigurationError, match="--energy-int8-add is 0; give pJ above 0"):
        EnergyModel(int8_add=0)
