"""The gated product with zeros against its naive form, in float64.

Tolerance 1e-12: both forms multiply the same two numbers.
"""

from __future__ import annotations

import pytest
import torch

from spikingbrain_train.ops.gated_activation import gated_relu, naive_gated_relu
from tests.models.kept_bytes import kept_bytes

TOLERANCE = 1e-12
SHAPES = [(1, 2), (7, 3, 10), (5, 66), (0, 8)]


def _gate_up(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_and_gradient_are_those_of_plain_operations(
    shape: tuple[int, ...], threshold: float, squared: bool
) -> None:
    ours, theirs = _gate_up(*shape), _gate_up(*shape)
    found = gated_relu(ours, threshold, squared=squared)
    expected = naive_gated_relu(theirs, threshold, squared=squared)
    grad = _gate_up(*found.shape, seed=1).detach()
    found.backward(grad)
    expected.backward(grad)
    assert torch.allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert ours.grad is not None and theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, rtol=0, atol=TOLERANCE)


def test_a_gate_at_the_threshold_is_open_and_one_at_zero_is_closed() -> None:
    gate_up = torch.tensor([[0.5, 0.4999, 0.0, 2.0, 2.0, 2.0]], dtype=torch.float64, requires_grad=True)
    assert gated_relu(gate_up, 0.5).tolist() == [[1.0, 0.0, 0.0]]
    gated_relu(gate_up).sum().backward()
    assert gate_up.grad is not None and gate_up.grad.tolist() == [[2.0, 2.0, 0.0, 0.5, 0.4999, 0.0]]


@pytest.mark.parametrize("threshold", [0.0, 0.1])
@pytest.mark.parametrize("place", [0, 1], ids=["gate", "up"])
def test_what_is_not_a_number_stays_so(place: int, threshold: float) -> None:
    gate_up = torch.ones(1, 2)
    gate_up[0, place] = float("nan")
    assert gated_relu(gate_up, threshold).isnan().all()


@pytest.mark.parametrize("squared", [False, True])
def test_an_l1_loss_adds_its_gradient(squared: bool) -> None:
    ours, theirs = _gate_up(6, 10), _gate_up(6, 10)
    gated_relu(ours, 0.1, 0.3, squared=squared).square().sum().backward()
    product = naive_gated_relu(theirs, 0.1, squared=squared)
    (product.square().sum() + 0.3 * product.abs().sum()).backward()
    assert ours.grad is not None and theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("squared", [False, True])
def test_autograd_keeps_the_input_alone(squared: bool) -> None:
    gate_up, kept = torch.randn(64, 256, requires_grad=True) * 1, list[int]()
    with kept_bytes(torch.nn.Identity(), kept):
        gated_relu(gate_up, squared=squared)
    assert kept == [gate_up.nbytes]
