"""RMSNorm's CPU form against its definition under autograd and against torch's own.

float64 agrees to rounding (1e-12); float32 is compared with float64 at 1e-5, since the weight's gradient is a
sum of 50 rows; bfloat16 results are float32 results rounded once, so one unit in the last place (2^-8) is the
bound.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spikingbrain_train.ops import rms_norm as module
from spikingbrain_train.ops.rms_norm import rms_norm

EPS = 1e-5
SHAPES = [(7, 16), (3, 2, 5, 8), (1, 1), (0, 4)]


def definition(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


@pytest.fixture(autouse=True, params=["one block", "blocks of 3 rows"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the rows into blocks that do not divide them."""
    if request.param != "one block":
        monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 3 * 16)


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight, grad = torch.randn(shape) * 3, torch.rand(shape[-1]) + 0.5, torch.randn(shape)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), grad.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_are_those_of_the_definition(shape: tuple[int, ...]) -> None:
    x, weight, grad = inputs(shape)
    ours, theirs = rms_norm(x, weight, EPS), definition(x, weight, EPS)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), grad),
        torch.autograd.grad(theirs, (x, weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)], ids=str)
def test_lower_precision_rounds_once(dtype: torch.dtype, bound: float) -> None:
    x, weight, grad = inputs((50, 64), dtype)
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    ours, theirs = rms_norm(x, weight, EPS), definition(x64, weight64, EPS)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), theirs, rtol=bound, atol=bound * 1e-2)
    ours_grad = torch.autograd.grad(ours, (x, weight), grad)
    theirs_grad = torch.autograd.grad(theirs, (x64, weight64), grad.double())
    for a, b in zip(ours_grad, theirs_grad, strict=True):
        assert a.dtype == dtype
        # Sums of terms of order 1 cancel, so the bound is on what they are sums of.
        torch.testing.assert_close(a.double(), b, rtol=bound, atol=bound)


def test_agrees_with_torch_on_strided_input() -> None:
    x, weight, _ = inputs((6, 4, 8), torch.float32)
    strided = x.transpose(0, 1)[:, 1::2]
    expected = torch.nn.functional.rms_norm(strided, (8,), weight, EPS)
    torch.testing.assert_close(rms_norm(strided, weight, EPS), expected, rtol=1e-6, atol=1e-6)


def test_rows_of_zeros_stay_zero_with_finite_gradients() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    y = rms_norm(x, torch.ones(8), EPS)
    y.sum().backward()
    assert (y == 0).all()
    torch.testing.assert_close(x.grad, torch.full_like(x, EPS**-0.5))
