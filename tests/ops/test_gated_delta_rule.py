"""The gated delta rule: the chunked form against the recurrence, fla's and transformers', for any gate."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import runpy
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spikingbrain_train.errors import PlatformError
from spikingbrain_train.ops.gated_delta_rule import (
    choose_backend,
    chunk,
    gated_delta_rule,
    gated_delta_rule_end_state,
    gated_delta_rule_step,
)
from spikingbrain_train.ops.gated_delta_rule.flash_linear_attention import fla_gated_delta_rule
from spikingbrain_train.ops.l2_norm import l2_norm
from spikingbrain_train.runtime import packages
from tests.ops import recurrences
from tests.ops.recurrences import outputs_and_gradients

NAMES = ("o", "final_state", "grad_q", "grad_k", "grad_v", "grad_log_gate", "grad_beta", "grad_state")


def make_log_gate(kind: str, shape: tuple[int, ...]) -> Tensor:
    """Log gates in [-50, 0] a step (or -inf), float64."""
    x = torch.rand(shape, dtype=torch.float64)
    if kind == "infinite":
        return torch.where(x < 0.2, float("-inf"), -x)
    return {
        "none": torch.zeros_like(x),
        "weak": -0.05 * x,
        # -A softplus(a) with A up to 16, as Qwen3-Next begins.
        "Qwen3-Next": -16 * x * torch.nn.functional.softplus(2 * torch.special.ndtri(x.clamp(1e-12))),
        "strong": -50 * x,
        "all -50": torch.full_like(x, -50.0),
        "mostly weak": -50 * x**12,
    }[kind]


KINDS = ("none", "weak", "Qwen3-Next", "strong", "all -50", "mostly weak")


def make_inputs(B: int, T: int, H: int, G: int, K: int, V: int, kind: str, seed: int = 0) -> list[Tensor]:
    """q, k, v, log_gate, beta and initial_state in float64, as the mixer makes them: q and k of length 1."""
    torch.manual_seed(seed)
    q, k = l2_norm(torch.randn(B, T, H, K).double()), l2_norm(torch.randn(B, T, G, K).double())
    v, state = torch.randn(B, T, G, V).double(), torch.randn(B, G, K, V).double()
    log_gate = make_log_gate(kind, (B, T, G))
    return [q, k, v, log_gate, torch.rand(B, T, G, dtype=torch.float64), state]


def forward_and_gradients(
    inputs: list[Tensor], backend: str, use: str = "both", cu_seqlens: list[int] | None = None
) -> list[Tensor]:
    """Output, final state and the gradients of all inputs, of what ``use`` names."""
    return outputs_and_gradients(gated_delta_rule, inputs, use, backend=backend, cu_seqlens=cu_seqlens)


SMALLEST = {"grad_state": 1e-3}
"""What is left of a state that later tokens wrote over is a difference of numbers around 1, to which rounding
is relative: with keys of width 1 and T = 13 that gradient is about 1e-8, and the forms part by 1e-16."""


relative_errors = partial(recurrences.relative_errors, NAMES, smallest=SMALLEST)


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


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4), kind=st.sampled_from(KINDS))
def test_documents_are_sequences_of_their_own(lengths: list[int], kind: str) -> None:
    bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    *inputs, _ = make_inputs(1, bounds[-1], 4, 2, 8, 4, kind)
    states = torch.randn(len(lengths), 2, 8, 4, dtype=torch.float64)
    found = forward_and_gradients([*inputs, states], "chunk", cu_seqlens=bounds)
    outputs, final_states = [], []
    for document, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        o, final = gated_delta_rule(
            *(x[:, start:end] for x in inputs),
            initial_state=states[document : document + 1],
            output_final_state=True,
            backend="naive",
        )
        outputs.append(o)
        final_states.append(final)
    assert (found[0] - torch.cat(outputs, 1)).norm() <= 1e-9 * found[0].norm()
    assert (found[1] - torch.cat(final_states)).norm() <= 1e-9 * found[1].norm()
    naive = forward_and_gradients([*inputs, states], "naive", cu_seqlens=bounds)
    errors = relative_errors(found, naive)
    assert max(errors.values()) <= 1e-9, errors


def test_segments_join_seamlessly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "_SEGMENT_ELEMENTS", 64)  # segments of one chunk each
    for kind in KINDS:
        inputs = make_inputs(1, 300, 4, 2, 8, 8, kind)
        errors = relative_errors(
            forward_and_gradients(inputs, "chunk"), forward_and_gradients(inputs, "naive")
        )
        assert max(errors.values()) <= 1e-11, errors


def test_one_key_again_and_again_is_replaced_each_time() -> None:
    # The worst system of a chunk: every token corrects all before it, and beta = 1 leaves nothing of them.
    inputs = make_inputs(1, 130, 2, 1, 8, 4, "none")
    inputs[1] = torch.zeros_like(inputs[1])
    inputs[1][..., 3] = 1.0
    inputs[4].fill_(1.0)
    found = forward_and_gradients(inputs, "chunk")
    errors = relative_errors(found, forward_and_gradients(inputs, "naive"))
    assert max(errors.values()) <= 1e-11, errors
    torch.testing.assert_close(found[1][0, 0, 3], inputs[2][0, -1, 0])


@pytest.mark.parametrize("backend", ["chunk", "naive"])
def test_log_gate_of_minus_infinity_forgets_everything_before(backend: str) -> None:
    *inputs, state = make_inputs(1, 150, 4, 2, 8, 8, "weak")
    inputs[3][:, 77] = float("-inf")
    o, final = gated_delta_rule(*inputs, initial_state=state, output_final_state=True, backend=backend)
    o_after, final_after = gated_delta_rule(
        *(x[:, 77:] for x in inputs), output_final_state=True, backend=backend
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
    # 1e-7 is one rounding of float32; sums of some ten terms and a triangular system of 64 cost one more
    # digit.
    errors = relative_errors(actual, forward_and_gradients(inputs, "naive"))
    assert max(errors.values()) <= 3e-6, errors


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    inputs = make_inputs(1, 200, 6, 2, 32, 32, "Qwen3-Next")
    inputs = [x.bfloat16().double() for x in inputs[:3]] + [x.float().double() for x in inputs[3:]]
    half = [x.bfloat16() for x in inputs[:3]] + [x.float() for x in inputs[3:]]
    actual = forward_and_gradients(half, "chunk")
    assert actual[0].dtype == torch.bfloat16 and actual[1].dtype == torch.float32
    # Outputs and gradients of 16-bit tensors are rounded once, to 2^-9 = 2e-3; the others are float32.
    errors = relative_errors(actual, forward_and_gradients(inputs, "naive"))
    assert max(errors.values()) <= 4e-3, errors


def test_steps_equal_the_chunked_form() -> None:
    *inputs, state = make_inputs(2, 90, 6, 2, 16, 8, "weak")
    expected, expected_state = gated_delta_rule(
        *inputs, initial_state=state, output_final_state=True, backend="chunk"
    )
    for t in range(90):
        o, state = gated_delta_rule_step(*(x[:, t] for x in inputs), state)
        torch.testing.assert_close(o, expected[:, t])
    torch.testing.assert_close(state, expected_state)


@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_affine_maps_of_the_state_and_compose(kind: str) -> None:
    *inputs, state = make_inputs(2, 200, 6, 2, 16, 8, kind)
    leaves = [x.requires_grad_() for x in (*inputs[1:], state)]
    first, second = (
        gated_delta_rule_end_state(*(x[:, part] for x in leaves[:4])) for part in (slice(71), slice(71, None))
    )
    composed = second[1] @ first[0] + second[0], second[1] @ first[1]
    for found, expected in zip(composed, gated_delta_rule_end_state(*leaves[:4]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    final = composed[1] @ leaves[4] + composed[0]
    _, expected = gated_delta_rule(
        inputs[0], *leaves[:4], initial_state=leaves[4], output_final_state=True, backend="naive"
    )
    assert expected is not None
    weight = torch.randn(final.shape, dtype=torch.float64)
    for found, of_naive in zip(
        (final, *torch.autograd.grad((final * weight).sum(), leaves)),
        (expected, *torch.autograd.grad((expected * weight).sum(), leaves)),
        strict=True,
    ):
        assert (found - of_naive).norm() <= 1e-11 * max(of_naive.norm(), 1e-30)


def _fla_naive() -> Callable[..., Any]:
    """fla's reference, loaded by itself: the package needs Triton."""
    folder = importlib.util.find_spec("fla")
    assert folder is not None and folder.submodule_search_locations is not None
    path = Path(folder.submodule_search_locations[0]) / "ops/gated_delta_rule/naive.py"
    return runpy.run_path(str(path))["naive_recurrent_gated_delta_rule"]


def test_matches_the_reference_of_flash_linear_attention() -> None:
    pytest.importorskip("einops")
    q, k, v, log_gate, beta, state = (x.float() for x in make_inputs(1, 100, 6, 2, 16, 16, "Qwen3-Next"))
    o, final = gated_delta_rule(q, k, v, log_gate, beta, initial_state=state, output_final_state=True)
    k, v, log_gate, beta = (x.repeat_interleave(3, dim=2) for x in (k, v, log_gate, beta))
    expected, expected_state = _fla_naive()(
        q, k, v, beta, log_gate, initial_state=state.repeat_interleave(3, dim=1), output_final_state=True
    )
    # Two float32 computations in different order.
    torch.testing.assert_close(o, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(final, expected_state[:, ::3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
@pytest.mark.parametrize("kind", ["weak", "Qwen3-Next"])
def test_matches_transformers(name: str, kind: str) -> None:
    try:
        module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    except ImportError:
        pytest.skip("transformers has no Qwen3-Next before 4.57")
    torch.manual_seed(0)
    q, k, v, log_gate, beta, state = (x.float() for x in make_inputs(2, 100, 4, 4, 16, 8, kind))
    q, k = 3 * q, 0.5 * k  # which transformers normalises itself
    expected, expected_state = inspect.unwrap(getattr(module, name))(
        q,
        k,
        v,
        g=log_gate,
        beta=beta,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    o, final = gated_delta_rule(
        l2_norm(q), l2_norm(k), v, log_gate, beta, initial_state=state, output_final_state=True
    )
    # Two float32 computations in different order.
    torch.testing.assert_close(o, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(final, expected_state, atol=1e-5, rtol=1e-5)


def test_l2_norm_is_that_of_fla() -> None:
    x = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True)
    y, expected = l2_norm(x), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    found, gradient = (torch.autograd.grad((each * weight).sum(), x)[0] for each in (y, expected))
    torch.testing.assert_close(found, gradient)
    assert l2_norm(torch.zeros(2, 8)).abs().max() == 0
    assert l2_norm(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"q": (1, 5, 5, 4)}, "query heads (5) must be a multiple of the number of groups (2)"),
        ({"k": (1, 4, 2, 4)}, "k must be [1, 5, 2, 4]"),
        ({"log_gate": (1, 5, 2, 4)}, "log_gate must be [1, 5, 2]"),
        ({"beta": (1, 5, 4)}, "beta must be [1, 5, 2]"),
        ({"v": (5, 2, 3)}, "v must have four dimensions"),
        ({"initial_state": (1, 4, 4, 3)}, "initial_state must be [1, 2, 4, 3]"),
        ({"q": (1, 0, 4, 4), "k": (1, 0, 2, 4), "v": (1, 0, 2, 3)}, "at least one token"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, tuple[int, ...]], sentence: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {"q": (1, 5, 4, 4), "k": (1, 5, 2, 4), "v": (1, 5, 2, 3)}
    shapes |= {"log_gate": (1, 5, 2), "beta": (1, 5, 2)} | change
    with pytest.raises(ValueError) as error:
        gated_delta_rule(**{name: torch.zeros(shape) for name, shape in shapes.items()})
    assert sentence in str(error.value)


def test_bad_bounds_and_end_states_are_named() -> None:
    x, g = torch.zeros(1, 5, 2, 4), torch.zeros(1, 5, 2)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T = 5"):
        gated_delta_rule(x, x, x, g, g, cu_seqlens=[0, 3, 3, 5])
    with pytest.raises(ValueError, match=r"log_gate and beta \[B, T, G\], not"):
        gated_delta_rule_end_state(x, x, g, g[:, :4])
    with pytest.raises(ValueError, match="at least one token"):
        gated_delta_rule_end_state(x[:, :0], x[:, :0], g[:, :0], g[:, :0])
    with pytest.raises(ValueError, match="share one floating dtype"):
        gated_delta_rule(x.bfloat16(), x, x, g, g)


def test_missing_or_unknown_backend_is_named() -> None:
    x, g = torch.zeros(1, 5, 2, 4), torch.zeros(1, 5, 2)
    with pytest.raises(PlatformError, match="gated_delta_rule=fla needs a GPU; choose auto"):
        gated_delta_rule(x, x, x, g, g, backend="fla")
    with pytest.raises(ValueError, match="gated_delta_rule=triton is unknown: choose one of auto"):
        gated_delta_rule(x, x, x, g, g, backend="triton")


def _chunk_gated_delta_rule(q, k, v, g, beta, *, scale, initial_state, output_final_state, cu_seqlens):  # type: ignore[no-untyped-def]
    """What fla's kernels do: one head a state, and differences of the running sums of log gates."""
    assert q.shape == k.shape and g.shape == beta.shape == q.shape[:3]
    assert cu_seqlens is None or cu_seqlens.dtype == torch.int64
    summed = g.float().cumsum(1)
    g = torch.cat((summed[:, :1], summed[:, 1:] - summed[:, :-1]), 1)
    return gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        backend="naive",
    )


@pytest.mark.parametrize("cu_seqlens", [None, (0, 5, 12)])
def test_fla_gets_heads_and_gates_that_it_can_take_and_computes_the_same(
    cu_seqlens: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = types.ModuleType("fla.ops.gated_delta_rule")
    vars(package).update(chunk_gated_delta_rule=_chunk_gated_delta_rule)
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", package)
    *inputs, state = (x.float() for x in make_inputs(1, 12, 4, 2, 3, 4, kind="weak"))
    if cu_seqlens is not None:
        state = torch.cat((state, 2 * state))
    inputs[3][:, 5] = float("-inf")
    inputs[3][:, 8] = -1e30
    options: dict[str, Any] = {"scale": 0.5, "output_final_state": True, "cu_seqlens": cu_seqlens}
    found = fla_gated_delta_rule(*inputs, state, **options)
    expected = gated_delta_rule(*inputs, initial_state=state, backend="naive", **options)
    for ours, theirs in zip(found, expected, strict=True):
        # Sums of gates of -100 leave float32 five digits for the others.
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("backend", "dtype", "device", "installed", "expected"),
    [
        ("auto", torch.bfloat16, "cpu", True, "chunk"),
        ("auto", torch.bfloat16, "cuda", False, "chunk"),
        ("auto", torch.bfloat16, "cuda", True, "fla"),
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
    assert choose_backend(backend, dtype, 128, device) == expected
    if installed and device == "cuda":
        assert choose_backend("auto", dtype, 512, device) == "chunk"
        with pytest.raises(ValueError, match="gated_delta_rule=fla needs keys of width 256 at most, not 512"):
            choose_backend("fla", torch.bfloat16, 512, device)
