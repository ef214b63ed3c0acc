"""Spike encoding against its equations (SpikingBrain, arXiv 2509.05276, eq. 19-21).

Rounding to whole spikes makes the encoding jump where x / Vth lies half-way between two counts. Threshold and
quotient are therefore computed the same way in the readable and the fast form, and their results are compared
bit by bit; what is checked independently (error, counts, limits) is bounded by Vth itself.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from spikingbrain_train.ops import spike_encoding as module
from spikingbrain_train.ops.spike_encoding import (
    MAX_THRESHOLD,
    MIN_THRESHOLD,
    magnitude_sum,
    naive_spike_encoding,
    spike_counts,
    spike_encoding,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tokens(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Values whose magnitudes spread over some orders, as activations' do."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    x, spread = (torch.randn(shape, generator=generator) for _ in range(2))
    return (x * spread.exp() * scale).to(dtype)


@pytest.fixture(autouse=True, params=["one block", "blocks of 3 tokens"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the tokens into blocks that do not divide them."""
    if request.param != "one block":
        monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 3 * 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 16), (3, 2, 5, 48), (1, 1), (0, 4), (5,)], ids=str)
def test_fast_form_is_the_readable_one_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = tokens(shape, dtype)
    encoded = spike_encoding(x, 3.0)
    assert encoded.dtype == dtype and encoded.shape == x.shape
    assert torch.equal(encoded, naive_spike_encoding(x, 3.0))


def test_a_token_worked_out_by_hand() -> None:
    # mean |x| = 3, so Vth = 1 for k = 3; half-way cases go to the even count.
    x = torch.tensor([[0.5, -1.5, 2.5, -7.5]])
    counts, threshold = spike_counts(x, 3.0)
    assert threshold.item() == 1.0
    assert counts.tolist() == [[0.0, -2.0, 2.0, -8.0]]
    # k = 1.5 doubles the threshold.
    assert spike_encoding(x, 1.5).tolist() == [[0.0, -2.0, 2.0, -8.0]]
    assert spike_counts(x, 1.5)[0].tolist() == [[0.0, -1.0, 1.0, -4.0]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.integers(1, 24).flatmap(
        lambda width: st.lists(
            st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=width, max_size=width),
            min_size=1,
            max_size=6,
        )
    ),
    k=st.floats(0.25, 64),
)
def test_any_token_is_encoded_within_half_a_threshold_of_whole_counts(
    rows: list[list[float]], k: float
) -> None:
    x = torch.tensor(rows, dtype=torch.float32)
    counts, threshold = spike_counts(x, k)
    exact = (x.double().abs().mean(-1, keepdim=True) / k).clamp(MIN_THRESHOLD, MAX_THRESHOLD)
    # float32 numbers are 2^-24 apart, relative; the threshold is rounded once.
    torch.testing.assert_close(threshold.double(), exact, rtol=2**-23, atol=0)
    assert torch.equal(counts, counts.round())
    encoded = spike_encoding(x, k)
    # Half a spike, and the rounding of quotient and product where counts are large.
    bound = threshold.double() * 0.5 + x.double().abs() * 2**-22
    assert ((encoded.double() - x.double()).abs() <= bound).all()
    assert torch.equal(encoded.double(), (counts.double() * threshold.double()).float().double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zeros_stay_zero_and_extremes_stay_finite(dtype: torch.dtype) -> None:
    assert (spike_encoding(torch.zeros(2, 8, dtype=dtype), 3.0) == 0).all()
    tiny = torch.full((1, 8), 1e-30, dtype=dtype)
    assert (spike_encoding(tiny, 3.0) == 0).all(), "below the smallest threshold nothing fires"
    huge = torch.full((1, 8), 1e38, dtype=dtype)  # their sum overflows float32
    counts, threshold = spike_counts(huge, 3.0)
    assert threshold.item() == MAX_THRESHOLD and counts.isfinite().all()
    torch.testing.assert_close(spike_encoding(huge, 3.0), huge, rtol=2**-7, atol=0)


def test_bfloat16_tokens_have_float32_thresholds() -> None:
    x = tokens((50, 64), torch.bfloat16)
    counts, threshold = spike_counts(x, 3.0)
    assert (counts.dtype, threshold.dtype) == (torch.float32, torch.float32)
    exact_counts, _ = spike_counts(x.float(), 3.0)
    # The same numbers in float32: sums in another precision may move a count that lies on a boundary by 1.
    assert (counts - exact_counts).abs().max() <= 1
    assert (counts != exact_counts).float().mean() < 1e-3
    assert torch.equal(spike_encoding(x, 3.0), (counts * threshold).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_is_straight_through(dtype: torch.dtype) -> None:
    x = tokens((6, 16), dtype).requires_grad_()
    grad = torch.randn(6, 16).to(dtype)
    spike_encoding(x, 3.0).backward(grad)
    assert torch.equal(x.grad, grad), "identity on x, nothing through the threshold"


def test_nothing_is_saved_for_the_backward_pass() -> None:
    saved: list[Tensor] = []
    x = tokens((6, 16)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        spike_encoding(x, 3.0)
    assert saved == []


def test_larger_k_approaches_the_input() -> None:
    x = tokens((20, 64)).double()
    errors = []
    for k in (1.0, 10.0, 100.0, 1e4):
        threshold = x.abs().mean(-1, keepdim=True) / k
        error = (spike_encoding(x, k) - x).abs()
        assert (error <= threshold * 0.5000001).all()
        errors.append(error.max().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_of_a_token_are_encoded_as_the_whole_is(parts: int, dtype: torch.dtype) -> None:
    x = tokens((40, 48), dtype)
    whole = spike_encoding(x, 3.0)
    magnitudes = torch.stack([magnitude_sum(part) for part in x.chunk(parts, dim=-1)]).sum(0)
    pieces = [spike_encoding(part, 3.0, magnitudes=magnitudes, width=48) for part in x.chunk(parts, dim=-1)]
    if dtype == torch.float32:  # sums in float64: no channel changes its count
        assert torch.equal(torch.cat(pieces, dim=-1), whole)
    else:  # sums in float32 move the threshold by 2^-23, which bfloat16 shows only on a boundary
        assert (torch.cat(pieces, dim=-1) != whole).float().mean() < 1e-3


def test_the_gpu_form_compiles_to_one_graph_and_computes_the_same() -> None:
    x = tokens((9, 48), torch.bfloat16)
    threshold = module.token_threshold(x, 3.0)
    compiled = torch.compile(module._quantize, dynamic=True, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, threshold), spike_encoding(x, 3.0))
