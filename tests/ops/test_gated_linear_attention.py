"""Gated linear attention: the chunked form against the recurrence, for every kind of gate."""

from __future__ import annotations

import importlib.util
import runpy
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spikingbrain_train.errors import PlatformError
from spikingbrain_train.ops.gated_linear_attention import (
    choose_backend,
    chunk,
    gated_linear_attention,
    gated_linear_attention_end_state,
    gated_linear_attention_step,
)
from spikingbrain_train.ops.gated_linear_attention.flash_linear_attention import fla_gated_linear_attention
from spikingbrain_train.runtime import packages
from tests.ops import recurrences
from tests.ops.recurrences import outputs_and_gradients

NAMES = ("o", "final_state", "grad_q", "grad_k", "grad_v", "grad_log_gate", "grad_initial_state")


def make_log_gate(kind: str, shape: tuple[int, ...]) -> Tensor:
    """Log gates in [-50, 0] a step (or -inf), float64."""
    x = torch.rand(shape, dtype=torch.float64)
    if kind == "infinite":
        return torch.where(x < 0.2, float("-inf"), -x)
    return {
        "none": torch.zeros_like(x),
        "7B": torch.nn.functional.logsigmoid(8 * x - 4) / 16,
        "medium": -3 * x,
        "strong": -50 * x,
        "all -50": torch.full_like(x, -50.0),
        "mostly weak": -50 * x**12,
        # Logits from N(0, 1.5^2) as in the 76B: log(1 - k) is -0.9 a step on average and sometimes below -5.
        "tied": torch.nn.functional.logsigmoid(-1.5 * torch.special.ndtri(x.clamp(1e-12))),
    }[kind]


KINDS = ("none", "7B", "tied", "medium", "strong", "all -50", "mostly weak")


def make_inputs(B: int, T: int, H: int, G: int, K: int, V: int, kind: str, seed: int = 0) -> list[Tensor]:
    """q, k, v, log_gate and initial_state in float64; q and k not negative, as in the 7B model."""
    torch.manual_seed(seed)
    q, k = torch.randn(B, T, H, K).double().relu(), torch.randn(B, T, G, K).double().relu()
    v, state = torch.randn(B, T, G, V).double(), torch.randn(B, G, K, V).double()
    return [q, k, v, make_log_gate(kind, (B, T, G, K)), state]


def forward_and_gradients(
    inputs: list[Tensor], backend: str, use: str = "both", cu_seqlens: list[int] | None = None
) -> list[Tensor]:
    """Output, final state and the gradients of all inputs, of what ``use`` names."""
    return outputs_and_gradients(gated_linear_attention, inputs, use, backend=backend, cu_seqlens=cu_seqlens)


relative_errors = partial(recurrences.relative_errors, NAMES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 7, 64, 133, 259])
def test_chunk_equals_recurrence_in_float64_for_any_gate(kind: str, T: int) -> None:
    # The bound of the project is 1e-9; float64 rounding over T steps stays orders of magnitude below it.
    inputs = make_inputs(2, T, 6, 2, 16, 8, kind)
    errors = relative_errors(forward_and_gradients(inputs, "chunk"), forward_and_gradients(inputs, "naive"))
    assert max(errors.values()) <= 1e-11, errors


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 150),
    G=st.integers(1, 3),
    R=st.integers(1, 3),
    K=st.integers(1, 12),
    V=st.integers(1, 12),
    kind=st.sampled_from(KINDS),
    use=st.sampled_from(["output", "state", "both"]),
)
def test_chunk_equals_recurrence_for_any_shape(
    B: int, T: int, G: int, R: int, K: int, V: int, kind: str, use: str
) -> None:
    inputs = make_inputs(B, T, G * R, G, K, V, kind, seed=T)
    errors = relative_errors(
        forward_and_gradients(inputs, "chunk", use), forward_and_gradients(inputs, "naive", use)
    )
    assert max(errors.values()) <= 1e-9, errors


def test_gradient_of_one_strong_gate_is_not_lost_in_cancellation() -> None:
    # Nothing but exp(-30) of the initial state reaches the log gate; the token's own terms must cancel
    # exactly.
    inputs = make_inputs(1, 1, 1, 1, 1, 1, "none", seed=5)
    inputs[0].fill_(1.0), inputs[1].fill_(1.0), inputs[3].fill_(-30.0)
    errors = relative_errors(forward_and_gradients(inputs, "chunk"), forward_and_gradients(inputs, "naive"))
    assert errors["grad_log_gate"] <= 1e-11, errors


def test_segments_of_different_gate_strength_join_seamlessly(monkeypatch: pytest.MonkeyPatch) -> None:
    # Segments of one chunk each; weak and very strong decay alternate, so both forms hand states to each
    # other.
    monkeypatch.setattr(chunk, "_SEGMENT_ELEMENTS", 64)
    inputs = make_inputs(1, 300, 4, 2, 8, 8, "7B")
    inputs[3][:, 64:128] = -50 * torch.rand_like(inputs[3][:, 64:128])
    inputs[3][:, 200:210] = -50.0
    errors = relative_errors(forward_and_gradients(inputs, "chunk"), forward_and_gradients(inputs, "naive"))
    assert max(errors.values()) <= 1e-11, errors


@pytest.mark.parametrize("backend", ["chunk", "naive"])
def test_log_gate_of_minus_infinity_forgets_everything_before(backend: str) -> None:
    inputs = make_inputs(1, 150, 4, 2, 8, 8, "7B")
    inputs[3][:, 77] = float("-inf")
    q, k, v, log_gate, state = inputs
    o, final = gated_linear_attention(
        q, k, v, log_gate, initial_state=state, output_final_state=True, backend=backend
    )
    o_after, final_after = gated_linear_attention(
        q[:, 77:], k[:, 77:], v[:, 77:], log_gate[:, 77:], output_final_state=True, backend=backend
    )
    torch.testing.assert_close(o[:, 77:], o_after)
    torch.testing.assert_close(final, final_after)


def test_gradients_stay_finite_with_infinite_log_gates() -> None:
    inputs = make_inputs(1, 130, 4, 2, 8, 8, "infinite")
    errors = relative_errors(forward_and_gradients(inputs, "chunk"), forward_and_gradients(inputs, "naive"))
    assert max(errors.values()) <= 1e-11, errors


@pytest.mark.parametrize("kind", KINDS)
def test_float32_keeps_float32_accuracy_for_any_gate(kind: str) -> None:
    inputs = make_inputs(1, 400, 6, 2, 32, 32, kind)
    inputs = [x.float().double() for x in inputs]
    actual = forward_and_gradients([x.float() for x in inputs], "chunk")
    # 1e-7 is one rounding of float32; sums of some hundred terms and exponents up to 40 cost one more digit.
    errors = relative_errors(actual, forward_and_gradients(inputs, "naive"))
    assert max(errors.values()) <= 3e-6, errors


@pytest.mark.parametrize("kind", ["none", "7B", "tied", "strong"])
def test_bfloat16_is_as_accurate_as_its_operands(kind: str) -> None:
    inputs = make_inputs(1, 400, 6, 2, 32, 32, kind)
    inputs = [x.bfloat16().double() for x in inputs[:3]] + [x.float().double() for x in inputs[3:]]
    half = [x.bfloat16() for x in inputs[:3]] + [x.float() for x in inputs[3:]]
    actual = forward_and_gradients(half, "chunk")
    assert actual[0].dtype == torch.bfloat16 and actual[1].dtype == torch.float32
    # bfloat16 rounds to 2^-9 = 2e-3; an operand, a product and a result are rounded one after the other, and
    # the gradient of the log gate is a difference of such results.
    errors = relative_errors(actual, forward_and_gradients(inputs, "naive"))
    assert max(errors.values()) <= 1.5e-2, errors


def test_two_halves_with_the_state_between_equal_the_whole() -> None:
    q, k, v, log_gate, state = make_inputs(2, 200, 6, 2, 16, 8, "medium")
    o, final = gated_linear_attention(q, k, v, log_gate, initial_state=state, output_final_state=True)
    o_first, middle = gated_linear_attention(
        q[:, :71], k[:, :71], v[:, :71], log_gate[:, :71], initial_state=state, output_final_state=True
    )
    o_second, end = gated_linear_attention(
        q[:, 71:], k[:, 71:], v[:, 71:], log_gate[:, 71:], initial_state=middle, output_final_state=True
    )
    torch.testing.assert_close(torch.cat((o_first, o_second), dim=1), o)
    torch.testing.assert_close(end, final)


def test_steps_equal_the_chunked_form() -> None:
    q, k, v, log_gate, state = make_inputs(2, 90, 6, 2, 16, 8, "7B")
    expected, expected_state = gated_linear_attention(
        q, k, v, log_gate, initial_state=state, output_final_state=True, backend="chunk"
    )
    for t in range(90):
        o, state = gated_linear_attention_step(q[:, t], k[:, t], v[:, t], log_gate[:, t], state)
        torch.testing.assert_close(o, expected[:, t])
    torch.testing.assert_close(state, expected_state)


@pytest.mark.parametrize("backend", ["chunk", "naive"])
def test_documents_do_not_see_each_other(backend: str) -> None:
    bounds = [0, 1, 2, 90, 150]
    q, k, v, log_gate, _ = make_inputs(1, 150, 6, 2, 16, 8, "medium")
    state = torch.randn(4, 2, 16, 8).double()
    leaves = [x.requires_grad_() for x in (q, k, v, log_gate, state)]
    o, final = gated_linear_attention(
        *leaves[:4], initial_state=state, output_final_state=True, backend=backend, cu_seqlens=bounds
    )
    parts = [
        gated_linear_attention(
            *(x[:, start:stop] for x in leaves[:4]),
            initial_state=state[document : document + 1],
            output_final_state=True,
            backend="naive",
        )
        for document, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]
    expected, expected_final = (
        torch.cat(x, dim) for x, dim in zip(zip(*parts, strict=True), (1, 0), strict=True)
    )
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(final, expected_final)
    torch.manual_seed(1)
    weights = torch.randn_like(o), torch.randn_like(final)
    actual = torch.autograd.grad((o, final), leaves, weights)
    exact_gradients = torch.autograd.grad((expected, expected_final), leaves, weights)
    for gradient, exact in zip(actual, exact_gradients, strict=True):
        torch.testing.assert_close(gradient, exact)


def test_documents_may_be_a_tensor_and_start_from_zeros_by_default() -> None:
    q, k, v, log_gate, _ = make_inputs(1, 20, 4, 2, 8, 8, "7B")
    o, final = gated_linear_attention(
        q, k, v, log_gate, output_final_state=True, cu_seqlens=torch.tensor([0, 12, 20], dtype=torch.int32)
    )
    alone, alone_final = gated_linear_attention(
        *(x[:, 12:] for x in (q, k, v, log_gate)), output_final_state=True
    )
    torch.testing.assert_close(o[:, 12:], alone)
    torch.testing.assert_close(final[1:], alone_final)


@pytest.mark.parametrize(
    ("cu_seqlens", "sentence"),
    [
        ([0, 3, 3, 5], "must rise from 0 to T = 5 without empty documents: \\[0, 3, 3, 5\\]"),
        ([0, 4], "must rise from 0 to T = 5"),
        ([5], "must rise from 0 to T = 5"),
        (torch.tensor([0.0, 5.0]), "must be integers"),
    ],
)
def test_documents_that_do_not_cover_the_sequence_are_refused(
    cu_seqlens: list[int] | torch.Tensor, sentence: str
) -> None:
    x = torch.zeros(1, 5, 2, 4)
    with pytest.raises(ValueError, match=sentence):
        gated_linear_attention(x, x, x, x, cu_seqlens=cu_seqlens)


def test_documents_of_several_rows_are_refused() -> None:
    x = torch.zeros(2, 5, 2, 4)
    with pytest.raises(ValueError, match="cu_seqlens needs B = 1, not 2: flatten the rows"):
        gated_linear_attention(x, x, x, x, cu_seqlens=[0, 5])


@pytest.mark.parametrize("kind", [*KINDS, "infinite"])
@pytest.mark.parametrize("T", [1, 150])
def test_end_state_and_decay_are_those_of_the_recurrence(kind: str, T: int) -> None:
    q, *leaves = make_inputs(2, T, 4, 2, 8, 6, kind)
    k, v, log_gate, before = (x.requires_grad_() for x in leaves)
    state, decay = gated_linear_attention_end_state(k, v, log_gate)
    after = state + decay.unsqueeze(-1) * before
    _, expected = gated_linear_attention(
        q, k, v, log_gate, initial_state=before, output_final_state=True, backend="naive"
    )
    torch.manual_seed(1)
    weight = torch.randn(after.shape).double()
    inputs = [k, v, log_gate, before]
    actual = [after, *torch.autograd.grad((after * weight).sum(), inputs)]
    exact = [expected, *torch.autograd.grad((expected * weight).sum(), inputs)]
    for name, a, e in zip(("state", "k", "v", "log_gate", "initial"), actual, exact, strict=True):
        # Float64 sums of the same terms in another order.
        assert (a - e).norm() <= 1e-11 * e.norm(), name


def test_end_state_needs_tokens_and_fitting_shapes() -> None:
    x = torch.zeros(1, 0, 2, 4)
    with pytest.raises(ValueError, match="at least one token"):
        gated_linear_attention_end_state(x, x, x)
    with pytest.raises(ValueError, match="k and log_gate must be"):
        gated_linear_attention_end_state(
            torch.zeros(1, 5, 2, 4), torch.zeros(1, 4, 2, 4), torch.zeros(1, 5, 2, 4)
        )


def _naive_recurrent_gla() -> Callable[..., tuple[Tensor, Tensor]]:
    """fla's reference, loaded from its file: importing its package needs Triton and a GPU."""
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        pytest.skip("flash-linear-attention is not installed")
    file = Path(package.submodule_search_locations[0], "ops", "gla", "naive.py")
    return runpy.run_path(str(file))["naive_recurrent_gla"]


def test_chunk_equals_flash_linear_attentions_naive_recurrence() -> None:
    naive = _naive_recurrent_gla()
    q, k, v, log_gate, state = (x.float() for x in make_inputs(1, 100, 6, 2, 16, 16, "7B"))
    o, final = gated_linear_attention(q, k, v, log_gate, initial_state=state, output_final_state=True)
    k, v, log_gate = (x.repeat_interleave(3, dim=2) for x in (k, v, log_gate))
    expected, expected_state = naive(q, k, v, log_gate, state.repeat_interleave(3, dim=1), True)
    # Two float32 computations in different order.
    torch.testing.assert_close(o, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(final, expected_state[:, ::3], atol=1e-4, rtol=1e-4)


def test_strided_inputs_give_the_same_result() -> None:
    inputs = make_inputs(2, 100, 6, 2, 16, 8, "7B")
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs[:4]] + inputs[4:]
    for actual, expected in zip(
        forward_and_gradients(strided, "chunk"), forward_and_gradients(inputs, "chunk"), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"q": (1, 5, 5, 4)}, "query heads (5) must be a multiple of the number of groups (2)"),
        ({"k": (1, 4, 2, 4)}, "k must be [1, 5, 2, 4]"),
        ({"log_gate": (1, 5, 4, 4)}, "log_gate must be [1, 5, 2, 4]"),
        ({"v": (5, 2, 3)}, "v must have four dimensions"),
        ({"initial_state": (1, 4, 4, 3)}, "initial_state must be [1, 2, 4, 3]"),
        ({"q": (1, 0, 4, 4), "k": (1, 0, 2, 4), "v": (1, 0, 2, 3)}, "at least one token"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, tuple[int, ...]], sentence: str) -> None:
    shapes = {"q": (1, 5, 4, 4), "k": (1, 5, 2, 4), "v": (1, 5, 2, 3), "log_gate": (1, 5, 2, 4)} | change
    with pytest.raises(ValueError) as error:
        gated_linear_attention(**{name: torch.zeros(shape) for name, shape in shapes.items()})
    assert sentence in str(error.value)


def test_mixed_dtypes_are_refused() -> None:
    x = torch.zeros(1, 5, 2, 4)
    with pytest.raises(ValueError, match="share one floating dtype"):
        gated_linear_attention(x.bfloat16(), x, x, x)


def test_missing_or_unknown_backend_is_named() -> None:
    x = torch.zeros(1, 5, 2, 4)
    with pytest.raises(PlatformError, match="gated_linear_attention=fla needs a GPU; choose auto"):
        gated_linear_attention(x, x, x, x, backend="fla")
    with pytest.raises(ValueError, match="gated_linear_attention=triton is unknown: choose one of auto"):
        gated_linear_attention(x, x, x, x, backend="triton")


def _chunk_gla(q, k, v, g, *, scale, initial_state, output_final_state, cu_seqlens):  # type: ignore[no-untyped-def]
    """What fla's kernels do with log gates: differences of their running sums."""
    b = g.float().cumsum(1)
    decay = (b.unsqueeze(2) - b.unsqueeze(1)).exp()
    scores = torch.einsum("bthk,bshk,btshk->btsh", q, k, decay) * scale
    causal = torch.ones(q.shape[1], q.shape[1]).tril()[None, :, :, None]
    return torch.einsum("btsh,bshv->bthv", torch.where(causal > 0, scores, 0.0), v), None


def test_fla_gets_gates_that_it_can_sum_and_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("fla.ops.gla")
    vars(package).update(chunk_gla=_chunk_gla)
    monkeypatch.setitem(sys.modules, "fla.ops.gla", package)
    q, k, v, log_gate, _ = make_inputs(1, 12, 2, 1, 3, 4, kind="medium")
    q, k, v, log_gate = (x.float() for x in (q, k, v, log_gate))
    log_gate[:, 5] = float("-inf")
    log_gate[:, 8] = -1e30
    o, _ = fla_gated_linear_attention(q, k, v, log_gate, None, scale=0.5, output_final_state=False)
    expected, _ = gated_linear_attention(q, k, v, log_gate, scale=0.5, backend="naive")
    torch.testing.assert_close(o, expected)


@pytest.mark.parametrize(
    ("backend", "dtype", "device", "installed", "expected"),
    [
        ("auto", torch.bfloat16, "cpu", True, "chunk"),
        ("auto", torch.bfloat16, "cuda", False, "chunk"),
        ("auto", torch.bfloat16, "cuda", True, "fla"),
        ("auto", torch.float32, "cuda", True, "fla"),
        ("auto", torch.float64, "cuda", True, "chunk"),
        ("naive", torch.float64, "cuda", True, "naive"),
    ],
)
def test_auto_takes_a_kernel_that_is_here_and_can(
    backend: str,
    dtype: torch.dtype,
    device: str,
    installed: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packages, "package_failure", lambda name: None if installed else "is not installed")
    assert choose_backend(backend, dtype, device) == expected
    if dtype == torch.float64:
        with pytest.raises(ValueError, match="gated_linear_attention=fla computes in float32, not"):
            choose_backend("fla", dtype, device)
