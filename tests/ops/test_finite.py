"""NaN and infinity are found wherever they are."""

from __future__ import annotations

import pytest
import torch

from spikingbrain_train.ops.finite import first_not_finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 500, 1000])
def test_one_number_among_many_is_found(dtype: torch.dtype, value: float, position: int) -> None:
    spoiled = torch.randn(1001).to(dtype)
    spoiled[position] = value
    clean = torch.randn(7, 11).to(dtype)
    assert first_not_finite([("a", clean), ("b", spoiled), ("c", spoiled)]) == "b"


def test_the_largest_finite_numbers_are_finite() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        largest = torch.full((4096,), torch.finfo(dtype).max, dtype=dtype)
        assert first_not_finite([("large", largest), ("small", -largest)]) is None


def test_nothing_integers_and_empty_tensors_are_finite() -> None:
    assert first_not_finite([]) is None
    assert first_not_finite([("ids", torch.tensor([1])), ("none", torch.empty(0))]) is None
