"""INT8 numbers in groups against arithmetic by hand."""

from __future__ import annotations

import pytest
import torch

from spikingbrain_train.ops.int8_groups import (
    from_codes,
    group_scales,
    int8_codes,
    int8_rounding,
    int8_vectors,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("width", "group_size"), [(12, 4), (12, 12), (5, 128)])
def test_groups_are_rounded_one_by_one(width: int, group_size: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1, :4] = 0.0
    scales = group_scales(x, group_size)
    codes = int8_codes(x, scales)
    rounded = from_codes(codes, scales, dtype)
    size = min(width, group_size)
    assert scales.shape == (3, width // size)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for row in range(3):
        for first in range(0, width, size):
            group = x[row, first : first + size].to(wide)
            scale = scales[row, first // size]
            if not group.any():
                assert not rounded[row, first : first + size].any()
                continue
            assert 1.0 <= scale / (group.abs().max() / 127) < 1.01, (
                "rounded up, by a step of bfloat16 at most"
            )
            assert scale.to(torch.bfloat16).to(wide) == scale
            expected = [round(float(value / scale)) for value in group]
            assert codes[row, first : first + size].tolist() == expected
            assert 126 <= max(map(abs, expected)) <= 127
            assert torch.equal(rounded[row, first : first + size], (torch.tensor(expected) * scale).to(dtype))
    assert torch.equal(codes.to(torch.int8).to(codes.dtype), codes)


def test_what_is_rounded_rounds_to_itself() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    scales = group_scales(x, 32)
    once = int8_rounding(x, scales)
    assert torch.equal(int8_rounding(once, scales), once)


def test_keys_and_values_have_a_scale_for_each_vector() -> None:
    x = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(3))
    x[0, 0, 0] = 0.0
    x[0, 0, 1] *= 1e-6
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(1e-5, 1e4)
    assert torch.equal(int8_vectors(x), (x / scale).round() * scale)


def test_the_gradient_is_straight_through() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    grad = torch.randn(2, 8)
    (found,) = torch.autograd.grad(int8_rounding(x, group_scales(x, 4)), x, grad)
    assert torch.equal(found, grad)
