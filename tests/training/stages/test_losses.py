"""Losses stay where they were computed, and say without being read whether their mean will be a number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spikingbrain_train.training.stages.losses import FINE, NOT_FINITE, NOTHING_COUNTED, StepLosses


def mean(sums: Tensor) -> dict[str, Tensor]:
    return {"train/loss": sums[1] / sums[0]}


@pytest.mark.parametrize(
    ("tokens", "loss", "standing"),
    [
        (4.0, 6.0, FINE),
        (4.0, math.nan, NOT_FINITE),
        (4.0, math.inf, NOT_FINITE),
        (0.0, 0.0, NOTHING_COUNTED),
        (0.0, math.nan, NOT_FINITE),
    ],
)
def test_a_mean_is_a_number_where_it_stands_fine(tokens: float, loss: float, standing: int) -> None:
    sums = torch.tensor([tokens, loss], dtype=torch.float64)
    losses = StepLosses(sums, mean, weight=sums[0])
    assert losses.standing.item() == standing
    assert math.isfinite(losses.reduced()["train/loss"]) == (standing == FINE)


def test_ranks_without_tokens_do_not_stand_in_the_way_and_one_that_is_not_finite_does() -> None:
    assert NOTHING_COUNTED < FINE < NOT_FINITE  # the largest of all ranks is what holds


def test_sums_that_are_divided_by_no_tokens_need_be_finite_only() -> None:
    assert StepLosses(torch.zeros(2), lambda sums: {"train/loss": sums.sum()}).standing.item() == FINE


def test_losses_are_reduced_once_however_often_they_are_read() -> None:
    calls = []

    def reduce(sums: Tensor) -> dict[str, Tensor]:
        calls.append(1)
        return mean(sums)

    losses = StepLosses(torch.tensor([2.0, 3.0]), reduce)
    losses.reduced()["train/loss"] = 0.0  # a copy
    assert losses.reduced() == {"train/loss": 1.5} and len(calls) == 1
