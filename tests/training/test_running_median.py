"""The median of the last good losses, and what it keeps over a restart."""

from __future__ import annotations

import statistics

import pytest
import torch

from spikingbrain_train.training.running_median import RunningMedian

CPU = torch.device("cpu")
LOSSES = [5.0, 4.0, 9.0, 3.5, 3.0, 8.0, 2.5, 2.0, 7.0, 1.5]


@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_it_is_that_of_the_newest_losses(size: int) -> None:
    running = RunningMedian(size, CPU)
    for number, loss in enumerate(LOSSES, start=1):
        running.add(torch.tensor(loss))
        newest = LOSSES[max(0, number - size) : number]
        assert running.count == len(newest)
        assert float(running.median()) == statistics.median_low(newest)


@pytest.mark.parametrize("size", [2, 4, 6])
def test_another_start_goes_on_with_the_newest_even_where_it_keeps_fewer_or_more(size: int) -> None:
    before, after = RunningMedian(4, CPU), RunningMedian(size, CPU)
    for loss in LOSSES[:7]:
        before.add(torch.tensor(loss))
    after.load_state_dict(before.state_dict())
    kept = LOSSES[3:7]
    for loss in LOSSES[7:]:
        kept.append(loss)
        after.add(torch.tensor(loss))
        assert float(after.median()) == statistics.median_low(kept[-size:])
