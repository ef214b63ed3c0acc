"""FP8 products against a float64 reference that rounds by tables, and against torch's own scaled product."""

from __future__ import annotations

from bisect import bisect_left
from itertools import product

import pytest
import torch
from torch import Tensor

from spikingbrain_train.config.fp8 import Fp8Format, Fp8Recipe
from spikingbrain_train.ops.fp8 import E4M3, E5M2, Blocks, fp8_codes, fp8_linear, fp8_product, rounding_of

TENSOR = Blocks(None, None)
OF_128 = Blocks(1, 128, powers_of_two=True)
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
SIZES = {Fp8Recipe.tensorwise: (None, None), Fp8Recipe.blockwise: (128, 128), Fp8Recipe.mxfp8: (1, 32)}


def numbers_of(exponent_bits: int, mantissa_bits: int, largest: float) -> list[float]:
    """What a format can hold, from 0 on (arXiv 2209.05433, table 1)."""
    bias = 2 ** (exponent_bits - 1) - 1
    found = []
    for exponent, mantissa in product(range(2**exponent_bits), range(2**mantissa_bits)):
        fraction = mantissa / 2**mantissa_bits
        if exponent == 0:
            found.append(fraction * 2.0 ** (1 - bias))
        else:
            found.append((1 + fraction) * 2.0 ** (exponent - bias))
    return [each for each in found if each <= largest]


NUMBERS = {E4M3: numbers_of(4, 3, 448.0), E5M2: numbers_of(5, 2, 57344.0)}


def nearest(x: float, format: torch.dtype) -> float:
    """The number of a format next to x; between two the one whose mantissa is even."""
    held, size = NUMBERS[format], abs(x)
    above = min(bisect_left(held, size), len(held) - 1)
    below = max(above - 1, 0)
    low, high = size - held[below], held[above] - size
    # Numbers are listed in the order of their bits, so that every second one is even.
    index = below if low < high or (low == high and below % 2 == 0) else above
    return held[index] if x >= 0 else -held[index]


def reference(x: Tensor, format: torch.dtype, across: int | None, along: int | None, rule: str) -> Tensor:
    """float64: what FP8 numbers hold of x [R, C], block by block and number by number."""
    out = x.double().clone()
    rows, columns = x.shape
    for top in range(0, rows, across or rows):
        for left in range(0, columns, along or columns):
            block = out[top : top + (across or rows), left : left + (along or columns)]
            largest = block.abs().max().item()
            if largest == 0:
                continue
            if rule == "exponent":  # the smallest power of 2 with largest / power <= M
                power = 2.0**-200
                while largest / power > LARGEST[format]:
                    power *= 2
                scale = 1 / power
            else:
                scale = (torch.tensor(LARGEST[format]) / torch.tensor(largest, dtype=torch.float32)).item()
                if rule == "power":
                    scale = 2.0 ** torch.tensor(scale, dtype=torch.float64).log2().floor().item()
            for row, column in product(range(block.shape[0]), range(block.shape[1])):
                scaled = torch.tensor(block[row, column].item(), dtype=torch.float32) * scale
                block[row, column] = nearest(scaled.item(), format) / scale
    return out


RULES = {Fp8Recipe.tensorwise: "exact", Fp8Recipe.blockwise: "power", Fp8Recipe.mxfp8: "exponent"}


@pytest.mark.parametrize("recipe", Fp8Recipe)
@pytest.mark.parametrize("format", Fp8Format)
def test_output_and_gradients_are_products_of_rounded_numbers(format: Fp8Format, recipe: Fp8Recipe) -> None:
    # float32 sums of 150 products at most: 1e-6 of the largest one.
    generator = torch.Generator().manual_seed(1)
    T, I, O = 37, 150, 40  # noqa: E741

    def random(*shape: int) -> Tensor:
        spread = torch.exp(3 * torch.randn(shape[0], 1, generator=generator))
        return (spread * torch.randn(*shape, generator=generator)).to(torch.bfloat16)

    x, w, dy = random(T, I).requires_grad_(), random(O, I).requires_grad_(), random(T, O)
    # In float32 the product is not rounded once more.
    y = fp8_linear(x.float(), w.float(), rounding_of(format, recipe))
    dx, dw = torch.autograd.grad(y, (x, w), dy.float())
    back = E5M2 if format is Fp8Format.hybrid else E4M3
    weight_across, along = SIZES[recipe]
    across = None if recipe is Fp8Recipe.tensorwise else 1
    rule = RULES[recipe]

    def value(x: Tensor, format: torch.dtype) -> Tensor:
        return reference(x.detach(), format, across, along, rule)

    def weight(w: Tensor) -> Tensor:
        return reference(w.detach(), E4M3, weight_across, along, rule)

    expected_y = value(x, E4M3) @ weight(w).t()
    expected_dx = value(dy, back) @ weight(w.t()).t()
    expected_dw = value(dy.t(), back) @ value(x.t(), E4M3).t()
    for found, expected in ((y, expected_y), (dx.float(), expected_dx), (dw.float(), expected_dw)):
        bound = 1e-6 if found is y else 2**-8  # gradients of bfloat16 tensors are rounded to it
        assert (found.double() - expected).abs().max() <= bound * expected.abs().max()
        relative = (found.double() - expected).norm() / expected.norm()
        assert relative <= (1e-6 if found is y else 2**-8)


def test_products_of_whole_tensors_are_those_of_torch() -> None:
    if not hasattr(torch, "_scaled_mm"):
        pytest.skip("this torch has no scaled product")
    a, b = torch.randn(48, 160), 3 * torch.randn(64, 160)
    for left, right in ((E4M3, E4M3), (E5M2, E4M3)):
        codes_a, codes_b = fp8_codes(a, left, TENSOR), fp8_codes(b, right, TENSOR)
        try:
            theirs = torch._scaled_mm(
                codes_a.codes,
                codes_b.codes.t(),
                codes_a.inverse_scales,
                codes_b.inverse_scales,
                out_dtype=torch.float32,
            )
        except (RuntimeError, NotImplementedError) as error:
            pytest.skip(f"this torch has no scaled product on CPUs ({error})")
        ours = fp8_product(codes_a, codes_b)
        # Sums of 160 float32 products in another order.
        assert (theirs - ours).abs().max() <= 2e-6 * ours.abs().max()


def test_a_format_holds_its_own_numbers_exactly() -> None:
    for format, held in NUMBERS.items():
        x = torch.tensor([[*held, *(-each for each in held)]])
        found = fp8_codes(x, format, TENSOR)
        assert found.inverse_scales == 1  # the largest of them is the format's
        assert torch.equal(found.values(), x)


@pytest.mark.parametrize("format", [E4M3, E5M2])
@pytest.mark.parametrize("blocks", [TENSOR, OF_128, Blocks(1, 32, exponents=True)])
def test_zeros_infinities_and_tiny_numbers_are_as_in_transformer_engine(
    format: torch.dtype, blocks: Blocks
) -> None:
    zeros = fp8_codes(torch.zeros(2, 256), format, blocks)
    assert (zeros.inverse_scales == 1).all() and (zeros.values() == 0).all()
    # An infinite one is the largest of its block, whose scale is 1; the others are rounded as they are.
    row = torch.tensor([[torch.inf, 1.0, -3.0, *[0.0] * 29]])
    found = fp8_codes(row, format, blocks).values()
    assert found[0, :3].tolist() == [LARGEST[format], 1.0, -3.0]
    assert fp8_codes(torch.tensor([[torch.nan, 1.0]]), format, blocks).values()[0, 0].isnan()
    tiny = torch.full((1, 32), 1e-39)  # M / 1e-39 is no float32 number
    assert fp8_codes(tiny, format, blocks).values().isfinite().all()


@pytest.mark.parametrize("recipe", Fp8Recipe)
def test_an_expert_without_tokens_has_gradients_of_zero(recipe: Fp8Recipe) -> None:
    x, w = torch.zeros(0, 160, requires_grad=True), torch.randn(48, 160, requires_grad=True)
    y = fp8_linear(x, w, rounding_of(Fp8Format.hybrid, recipe))
    y.sum().backward()
    assert y.shape == (0, 48) and x.grad is not None and x.grad.shape == (0, 160)
    assert w.grad is not None and (w.grad == 0).all()


def test_what_is_kept_for_the_backward_pass_takes_a_byte_a_number() -> None:
    kept: list[Tensor] = []
    x, w = torch.randn(64, 32, requires_grad=True), torch.randn(48, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        fp8_linear(x, w, rounding_of(Fp8Format.hybrid, Fp8Recipe.tensorwise))
    assert sum(each.nbytes for each in kept) == 64 * 32 + 48 * 32 + 2 * 4  # and two scales
