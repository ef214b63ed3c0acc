"""Sliding-window attention: every backend of this machine against a masked softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spikingbrain_train.config.errors import PlatformError
from spikingbrain_train.ops.sliding_window_attention import blocked, sliding_window_attention


def make_inputs(B: int, T: int, H: int, G: int, K: int, V: int, seed: int = 0) -> list[Tensor]:
    """q, k, v in float64."""
    torch.manual_seed(seed)
    return [torch.randn(B, T, heads, dim).double() for heads, dim in ((H, K), (G, K), (G, V))]


def forward_and_gradients(inputs: list[Tensor], window: int | None, backend: str) -> list[Tensor]:
    q, k, v = leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o = sliding_window_attention(q, k, v, window=window, backend=backend)
    torch.manual_seed(1)
    return [o.detach(), *torch.autograd.grad((o * torch.randn(o.shape).double()).sum(), leaves)]


def largest_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest absolute error of output and gradients, in units of the largest expected value of all of
    them."""
    scale = max(e.abs().max().item() for e in expected)
    return max((a.double() - e).abs().max().item() for a, e in zip(actual, expected, strict=True)) / scale


def test_reference_sees_exactly_the_window() -> None:
    q, k, v = make_inputs(1, 9, 2, 1, 4, 3)
    o = sliding_window_attention(q, k, v, window=3, backend="reference")
    for t in range(9):
        keys = slice(max(0, t - 2), t + 1)
        for head in range(2):
            p = (k[0, keys, 0] @ q[0, t, head] / 2.0).softmax(0)
            torch.testing.assert_close(o[0, t, head], p @ v[0, keys, 0])


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
@pytest.mark.parametrize("window", [None, 1, 2, 37, 64, 256, 299, 300, 1000])
def test_backends_equal_masked_softmax_in_float64(backend: str, window: int | None) -> None:
    inputs = make_inputs(1, 300, 6, 2, 16, 8)
    expected = forward_and_gradients(inputs, window, "reference")
    # Exact up to float64 rounding.
    assert largest_error(forward_and_gradients(inputs, window, backend), expected) <= 1e-13


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 330),
    G=st.integers(1, 3),
    R=st.integers(1, 4),
    K=st.integers(1, 10),
    V=st.integers(1, 10),
    window=st.none() | st.integers(1, 340),
)
def test_blocked_equals_masked_softmax_for_any_shape(
    B: int, T: int, G: int, R: int, K: int, V: int, window: int | None
) -> None:
    inputs = make_inputs(B, T, G * R, G, K, V, seed=T)
    expected = forward_and_gradients(inputs, window, "reference")
    assert largest_error(forward_and_gradients(inputs, window, "blocked"), expected) <= 1e-12


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_low_precision_is_as_accurate_as_its_operands(
    dtype: torch.dtype, tolerance: float, window: int | None
) -> None:
    # One rounding is 6e-8 in float32 and 2e-3 in bfloat16; probabilities, their gradients and results are
    # rounded.
    inputs = [x.to(dtype).double() for x in make_inputs(1, 500, 6, 2, 64, 64)]
    actual = forward_and_gradients([x.to(dtype) for x in inputs], window, "blocked")
    assert actual[0].dtype == dtype
    assert largest_error(actual, forward_and_gradients(inputs, window, "reference")) <= tolerance


@pytest.mark.parametrize("window", [None, 300])
def test_bfloat16_errs_little_more_than_torch_sdpa_with_large_scores(window: int | None) -> None:
    # Scores up to about 100: bfloat16 scores would be off by 0.25 and probabilities by a quarter.
    q, k, v = make_inputs(1, 600, 6, 2, 64, 64)
    inputs = [x.bfloat16().double() for x in (8 * q, k, v)]
    expected = forward_and_gradients(inputs, window, "reference")
    half = [x.bfloat16() for x in inputs]
    error = largest_error(forward_and_gradients(half, window, "blocked"), expected)
    assert error <= 3 * largest_error(forward_and_gradients(half, window, "sdpa"), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_maximum_far_outside_the_guessed_keys_is_found(dtype: torch.dtype) -> None:
    # Key 300 gets scores above 1000 from every later query: exp overflows unless the true maximum is
    # subtracted.
    q, k, v = make_inputs(1, 1024, 2, 1, 16, 16)
    q[..., 0] = 30.0
    k[..., 0] = 0.0
    k[:, 300, :, 0] = 200.0
    inputs = [x.to(dtype).double() for x in (q, k, v)]
    expected = forward_and_gradients(inputs, None, "reference")
    actual = forward_and_gradients([x.to(dtype) for x in inputs], None, "blocked")
    assert all(x.isfinite().all() for x in actual)
    assert largest_error(actual, expected) <= (1e-12 if dtype == torch.float64 else 2e-2)


class _LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_blocked_never_makes_a_square_of_the_sequence() -> None:
    T, window = 4096, 64
    inputs = [x.bfloat16() for x in make_inputs(1, T, 1, 1, 8, 8)]
    with _LargestTensor() as largest:
        forward_and_gradients(inputs, window, "blocked")
    assert largest.elements <= T * 32  # the inputs themselves have T * 8


def test_gradients_reach_the_model_through_strided_inputs() -> None:
    inputs = make_inputs(2, 100, 6, 2, 16, 8)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    actual, expected = (forward_and_gradients(x, 30, "blocked") for x in (strided, inputs))
    assert largest_error(actual, expected) <= 1e-14


@pytest.mark.parametrize(
    ("change", "window", "sentence"),
    [
        ({"q": (1, 5, 5, 4)}, None, "query heads (5) must be a multiple of the number of groups (2)"),
        ({"k": (1, 4, 2, 4)}, None, "k must be [1, 5, 2, 4]"),
        ({"v": (5, 2, 3)}, None, "v must have four dimensions"),
        ({}, 0, "window is 0: it must be at least 1"),
    ],
)
def test_inputs_that_do_not_fit_are_named(
    change: dict[str, tuple[int, ...]], window: int | None, sentence: str
) -> None:
    shapes = {"q": (1, 5, 4, 4), "k": (1, 5, 2, 4), "v": (1, 5, 2, 3)} | change
    with pytest.raises(ValueError) as error:
        sliding_window_attention(**{n: torch.zeros(s) for n, s in shapes.items()}, window=window)
    assert sentence in str(error.value)


@pytest.mark.parametrize("backend", ["flash_attn", "flex"])
def test_gpu_backends_are_refused_on_cpu(backend: str) -> None:
    x = torch.zeros(1, 5, 2, 4)
    with pytest.raises(PlatformError, match=f"softmax_attention={backend} needs tensors on a GPU"):
        sliding_window_attention(x, x, x, window=None, backend=backend)


def test_unknown_backend_is_named() -> None:
    x = torch.zeros(1, 5, 2, 4)
    with pytest.raises(ValueError, match="softmax_attention=triton is unknown: choose one of auto"):
        sliding_window_attention(x, x, x, window=None, backend="triton")


def test_tiles_cover_every_visible_pair_once() -> None:
    T, window = 336, 50
    seen = torch.zeros(T, T, dtype=torch.int)
    for tile in blocked._tiles(1, 1, T, 64, window):
        C, S = tile.queries.stop - tile.queries.start, tile.keys.stop - tile.keys.start
        seen[tile.queries, tile.keys] += tile.mask_(torch.ones(1, C, S), 0.0)[0].int()
    expected = torch.ones(T, T, dtype=torch.int).tril().triu(1 - window)
    assert torch.equal(seen, expected)
