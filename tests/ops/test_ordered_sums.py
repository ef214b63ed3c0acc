"""Running sums in a fixed order are those of torch."""

from __future__ import annotations

import pytest
import torch

from spikingbrain_train.ops.ordered_sums import by_doubling, cumulative_sum


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65])
@pytest.mark.parametrize("dim", [0, -2])
def test_they_and_their_gradients_are_those_of_cumsum(size: int, dim: int) -> None:
    shape = [3, 5, 2]
    shape[dim] = size
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64)
    ours, theirs = by_doubling(x, dim), x.cumsum(dim)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad((ours * weight).sum(), x)
    torch.testing.assert_close(grad, weight.flip(dim).cumsum(dim).flip(dim), rtol=1e-12, atol=1e-12)


def test_what_is_forgotten_for_good_spoils_nothing_before_it() -> None:
    log_gate = torch.tensor([-1.0, -2.0, -torch.inf, -1.0])
    expected = torch.tensor([-1.0, -3.0, -torch.inf, -torch.inf])
    assert torch.equal(by_doubling(log_gate, 0), expected)
    assert torch.equal(cumulative_sum(log_gate, 0), expected)
