"""Rounding with known inputs: GPTQ against its definition, and against plain rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spikingbrain_train.ops.gptq import gptq_rounding, output_error, plain_rounding
from spikingbrain_train.ops.int8_groups import group_scales, int8_codes

INPUTS = 192


def problem(silent: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, INPUTS, generator=generator)
    weight[3, 5] = 9.0
    mixing = torch.randn(12, INPUTS, generator=generator)
    x = torch.randn(400, 12, generator=generator) @ mixing + 0.1 * torch.randn(
        400, INPUTS, generator=generator
    )
    if silent:
        x[:, 7] = 0.0
    return weight, (x.T @ x).double()


def naive_gptq(weight: Tensor, group_size: int, hessian: Tensor) -> Tensor:
    """One channel after the other, the inverse of the rest computed anew each time (eq. 2 of GPTQ)."""
    rest, codes = weight.double().clone(), torch.zeros_like(weight)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    for channel in range(rest.shape[1]):
        if channel % group_size == 0:
            scale = group_scales(rest[:, channel : channel + group_size].float(), group_size)[:, 0].double()
        inverse = torch.linalg.inv(damped[channel:, channel:])
        codes[:, channel] = (rest[:, channel] / scale).round().clamp(-127, 127)
        error = (rest[:, channel] - codes[:, channel].double() * scale) / inverse[0, 0]
        rest[:, channel + 1 :] -= error.unsqueeze(1) * inverse[0, 1:]
    return codes


@pytest.mark.parametrize("group_size", [32, 96, 192])
def test_gptq_is_its_definition(group_size: int) -> None:
    weight, hessian = problem()
    found = gptq_rounding(weight, group_size, hessian)
    expected = naive_gptq(weight, group_size, hessian)
    # A weight on a rounding boundary may go either way with the last bit.
    assert (found.codes.float() != expected).float().mean() < 1e-3


@pytest.mark.parametrize("silent", [False, True])
def test_gptq_is_better_than_plain_rounding_where_inputs_are_correlated(silent: bool) -> None:
    weight, hessian = problem(silent)
    plain = plain_rounding(weight, 64)
    compensated = gptq_rounding(weight, 64, hessian)
    assert output_error(weight, compensated, hessian) < 0.5 * output_error(weight, plain, hessian)
    assert compensated.codes.dtype == torch.int8


def test_plain_rounding_is_what_training_sees() -> None:
    weight, _ = problem()
    plain = plain_rounding(weight, 64)
    scales = group_scales(weight, 64)
    assert torch.equal(plain.scales, scales) and torch.equal(plain.codes.float(), int8_codes(weight, scales))


def test_calibrated_scales_give_no_larger_error_on_independent_inputs() -> None:
    weight, hessian = problem()
    moments = hessian.diagonal()
    plain, calibrated = plain_rounding(weight, 64), plain_rounding(weight, 64, moments)
    diagonal = torch.diag(moments)
    assert output_error(weight, calibrated, diagonal) <= output_error(weight, plain, diagonal)
    assert torch.equal(calibrated.scales.bfloat16().float(), calibrated.scales)


def test_the_error_is_that_of_outputs() -> None:
    weight, _ = problem()
    x = torch.randn(50, INPUTS, generator=torch.Generator().manual_seed(4)).double()
    rounded = plain_rounding(weight, 64)
    exact = x @ weight.double().T
    expected = ((x @ rounded.weight().double().T - exact).norm() / exact.norm()).item()
    assert output_error(weight, rounded, x.T @ x) == pytest.approx(expected, rel=1e-6)
