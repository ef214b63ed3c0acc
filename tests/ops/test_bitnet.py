"""Ternary weights and INT8 inputs against the training code of transformers (integrations/bitnet.py).

That computes in float32, with a float32 mean, and multiplies codes by the reciprocal of a reciprocal: values
differ from ours by a few roundings, 1e-6 relative.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from spikingbrain_train.ops.int8_tokens import (
    codes_per_unit,
    int8_token_codes,
    int8_token_rounding,
    largest_magnitudes,
)
from spikingbrain_train.ops.ternary import (
    magnitude_sum,
    ternary_codes,
    ternary_parameters,
    ternary_rounding,
    ternary_scales,
)

SHAPES = [(1, 1), (7, 5), (64, 96), (33, 577)]
TOLERANCE = 2e-6


@pytest.fixture(scope="module", autouse=True)
def eager() -> Iterator[None]:
    """transformers' functions are compiled; as they are written they need no compiler."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def scale_of(weight: Tensor) -> Tensor:
    return ternary_scales(magnitude_sum(weight), weight.numel(), weight.dtype)


def ours(weight: Tensor) -> Tensor:
    return ternary_rounding(weight, scale_of(weight))


def inputs(x: Tensor) -> Tensor:
    return int8_token_rounding(x, codes_per_unit(largest_magnitudes(x)))


@pytest.mark.parametrize("nonzero", [0.05, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_are_found_whose_codes_and_scale_are_those_asked_for(
    dtype: torch.dtype, nonzero: float
) -> None:
    generator = torch.Generator().manual_seed(int(100 * nonzero))
    for shape in SHAPES[1:]:
        codes = torch.randn(shape, generator=generator).sign()
        codes = codes * (torch.rand(shape, generator=generator) < nonzero)
        codes[0, 0] = 1.0
        scale = torch.rand((), generator=generator).to(dtype if nonzero == 1.0 else torch.float32).float()
        weight = ternary_parameters(codes.to(torch.int8), scale.item(), dtype)
        assert weight.dtype is dtype and weight.shape == shape
        assert torch.equal(scale_of(weight), scale)
        assert torch.equal(ternary_codes(weight, scale), codes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_transformers(shape: tuple[int, int], dtype: torch.dtype) -> None:
    bitnet: Any = pytest.importorskip("transformers.integrations.bitnet")
    generator = torch.Generator().manual_seed(sum(shape))
    for theirs, mine in ((bitnet.WeightQuant.apply, ours), (bitnet.ActQuant.apply, inputs)):
        x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        found, expected = mine(leaves[0]), theirs(leaves[1])
        assert found.dtype == expected.dtype == dtype
        bound = TOLERANCE if dtype == torch.float32 else 2**-8
        assert (found - expected).abs().max() <= bound * expected.abs().max()
        found.backward(grad)
        expected.backward(grad)
        assert torch.equal(leaves[0].grad, leaves[1].grad) and torch.equal(leaves[0].grad, grad)


def test_a_linear_is_auto_bit_linear() -> None:
    bitnet: Any = pytest.importorskip("transformers.integrations.bitnet")
    generator = torch.Generator().manual_seed(4)
    linear = bitnet.AutoBitLinear(96, 40, bias=True, online_quant=True)
    weight, x, grad = (
        torch.randn(shape, generator=generator) for shape in ((40, 96), (3, 11, 96), (3, 11, 40))
    )
    with torch.no_grad():
        linear.weight.copy_(weight)
    theirs = x.clone().requires_grad_()
    expected = linear(theirs)
    expected.backward(grad)
    leaves = [each.clone().requires_grad_() for each in (x, weight, linear.bias.detach())]
    found = torch.nn.functional.linear(inputs(leaves[0]), ours(leaves[1]), leaves[2])
    found.backward(grad)
    pairs = [(found, expected)] + list(
        zip([leaf.grad for leaf in leaves], [theirs.grad, linear.weight.grad, linear.bias.grad], strict=True)
    )
    for mine, other in pairs:
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max()


def test_the_boundaries_of_the_paper() -> None:
    weight = torch.tensor([[0.5, -0.5, 0.51, -0.51], [1.0, -3.0, 0.0, 1.98]])
    assert scale_of(weight) == 1.0
    assert ternary_codes(weight, scale_of(weight)).tolist() == [[0, 0, 1, -1], [1, -1, 0, 1]]
    x = torch.tensor([[-127.0, 0.5, 1.5, -2.5, 126.6], [0.0, 0.0, 0.0, 0.0, 0.0]])
    codes = int8_token_codes(x, codes_per_unit(largest_magnitudes(x)))
    assert codes.tolist() == [[-127, 0, 2, -2, 127], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e30])
def test_numbers_of_any_size_stay_finite(size: float) -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)) * size
    for rounded in (ours(x), inputs(x), ours(torch.zeros(2, 3)), inputs(torch.zeros(2, 3))):
        assert rounded.isfinite().all()
    assert (inputs(x) - x).abs().max() <= max(x.abs().max() / 254 * 1.001, 1e-5 / 254)
    assert ours(x).abs().unique().numel() <= 2


def test_integers_of_both_sides_give_the_fake_quantised_product_up_to_the_scale() -> None:
    """In int64, where nothing is rounded; the float product rounds 577 sums, 1e-6 relative."""
    generator = torch.Generator().manual_seed(9)
    weight, x = (torch.randn(shape, generator=generator) for shape in ((33, 577), (12, 577)))
    scale, per_unit = scale_of(weight), codes_per_unit(largest_magnitudes(x))
    whole = int8_token_codes(x, per_unit).to(torch.int64) @ ternary_codes(weight, scale).to(torch.int64).T
    found = whole.double() * scale / per_unit
    expected = torch.nn.functional.linear(inputs(x), ours(weight))
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
