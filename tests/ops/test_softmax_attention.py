"""Sliding-window attention: every backend of this machine against a masked softmax."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as flex_attention_module
from torch.utils._python_dispatch import TorchDispatchMode

from spikingbrain_train.architecture.backends.softmax_attention import SoftmaxAttentionCall
from spikingbrain_train.errors import PlatformError
from spikingbrain_train.ops.softmax_attention import (
    bidirectional_attention,
    blocked,
    choose_backend,
    flex,
    softmax_attention,
)
from spikingbrain_train.ops.softmax_attention.documents import Documents
from spikingbrain_train.ops.softmax_attention.flash import flash_attn_softmax_attention
from spikingbrain_train.runtime import packages

CPU_BACKENDS = ["naive", "blocked", "sdpa"]


def make_inputs(B: int, T: int, H: int, G: int, K: int, V: int, seed: int = 0) -> list[Tensor]:
    """q, k, v in float64."""
    torch.manual_seed(seed)
    return [torch.randn(B, T, heads, dim).double() for heads, dim in ((H, K), (G, K), (G, V))]


def output_and_gradients(attend: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o = attend(*leaves)
    torch.manual_seed(1)
    return [o.detach(), *torch.autograd.grad((o * torch.randn(o.shape).double()).sum(), leaves)]


def forward_and_gradients(
    inputs: list[Tensor], window: int | None, backend: str, **layout: Any
) -> list[Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(q, k, v, window=window, backend=backend, **layout)

    return output_and_gradients(attend, inputs)


def visible_pairs(
    window: int, num_sink_tokens: int, query_lengths: list[int], key_lengths: list[int]
) -> Tensor:
    """The mask, one query after the other: boolean [Tq, num_sink_tokens + Tk]."""
    mask = torch.zeros(sum(query_lengths), num_sink_tokens + sum(key_lengths), dtype=torch.bool)
    mask[:, :num_sink_tokens] = True
    first_query, first_key = 0, num_sink_tokens
    for queries, keys in zip(query_lengths, key_lengths, strict=True):
        for i in range(queries):
            standing = keys - queries + i
            first_seen = first_key + max(0, standing - window + 1)
            mask[first_query + i, first_seen : first_key + standing + 1] = True
        first_query, first_key = first_query + queries, first_key + keys
    return mask


def masked_softmax(inputs: list[Tensor], mask: Tensor) -> list[Tensor]:
    """Output and gradients of attention with any mask, heads in a loop."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = []
        for h in range(q.shape[2]):
            group = h * k.shape[2] // q.shape[2]
            scores = q[:, :, h] @ k[:, :, group].transpose(1, 2) / q.shape[-1] ** 0.5
            heads.append(scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v[:, :, group])
        return torch.stack(heads, dim=2)

    return output_and_gradients(attend, inputs)


def bounds(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def largest_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest absolute error of output and gradients, in units of the largest expected value of all of
    them."""
    scale = max(e.abs().max().item() for e in expected)
    return max((a.double() - e).abs().max().item() for a, e in zip(actual, expected, strict=True)) / scale


def test_the_naive_form_sees_exactly_the_window() -> None:
    q, k, v = make_inputs(1, 9, 2, 1, 4, 3)
    o = softmax_attention(q, k, v, window=3, backend="naive")
    for t in range(9):
        keys = slice(max(0, t - 2), t + 1)
        for head in range(2):
            p = (k[0, keys, 0] @ q[0, t, head] / 2.0).softmax(0)
            torch.testing.assert_close(o[0, t, head], p @ v[0, keys, 0])


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
@pytest.mark.parametrize("window", [None, 1, 2, 37, 64, 256, 299, 300, 1000])
def test_backends_equal_masked_softmax_in_float64(backend: str, window: int | None) -> None:
    inputs = make_inputs(1, 300, 6, 2, 16, 8)
    expected = forward_and_gradients(inputs, window, "naive")
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
    expected = forward_and_gradients(inputs, window, "naive")
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
    assert largest_error(actual, forward_and_gradients(inputs, window, "naive")) <= tolerance


@pytest.mark.parametrize("window", [None, 300])
def test_bfloat16_errs_little_more_than_torch_sdpa_with_large_scores(window: int | None) -> None:
    # Scores up to about 100: bfloat16 scores would be off by 0.25 and probabilities by a quarter.
    q, k, v = make_inputs(1, 600, 6, 2, 64, 64)
    inputs = [x.bfloat16().double() for x in (8 * q, k, v)]
    expected = forward_and_gradients(inputs, window, "naive")
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
    expected = forward_and_gradients(inputs, None, "naive")
    actual = forward_and_gradients([x.to(dtype) for x in inputs], None, "blocked")
    assert all(x.isfinite().all() for x in actual)
    assert largest_error(actual, expected) <= (1e-12 if dtype == torch.float64 else 2e-2)


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 2),
    Tq=st.integers(1, 150),
    earlier=st.integers(0, 90),
    num_sink_tokens=st.integers(0, 40),
    G=st.integers(1, 2),
    R=st.integers(1, 3),
    window=st.none() | st.integers(1, 250),
    backend=st.sampled_from(CPU_BACKENDS),
)
def test_sinks_and_keys_before_the_first_query_equal_a_masked_softmax(
    B: int, Tq: int, earlier: int, num_sink_tokens: int, G: int, R: int, window: int | None, backend: str
) -> None:
    Tk = Tq + earlier
    inputs = make_inputs(B, num_sink_tokens + Tk, G * R, G, 6, 5, seed=Tq)
    inputs[0] = inputs[0][:, :Tq]
    mask = visible_pairs(window or Tk, num_sink_tokens, [Tq], [Tk])
    actual = forward_and_gradients(inputs, window, backend, num_sink_tokens=num_sink_tokens)
    assert largest_error(actual, masked_softmax(inputs, mask)) <= 1e-12


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), min_size=1, max_size=6),
    num_sink_tokens=st.sampled_from([0, 1, 16, 21]),
    window=st.none() | st.integers(1, 100),
    backend=st.sampled_from(CPU_BACKENDS),
    as_tensors=st.booleans(),
)
def test_documents_do_not_see_each_other_and_share_the_sinks(
    lengths: list[tuple[int, int]], num_sink_tokens: int, window: int | None, backend: str, as_tensors: bool
) -> None:
    # Documents of every kind: without queries, with as many keys as queries, with more keys.
    lengths = [*lengths, (7, 3)]
    query_lengths = [queries for queries, _ in lengths]
    key_lengths = [queries + earlier for queries, earlier in lengths]
    Tk = sum(key_lengths)
    inputs = make_inputs(1, num_sink_tokens + Tk, 4, 2, 6, 5, seed=Tk)
    inputs[0] = inputs[0][:, : sum(query_lengths)]
    cu_seqlens: list[Any] = [bounds(query_lengths), bounds(key_lengths)]
    if as_tensors:
        cu_seqlens = [torch.tensor(x, dtype=torch.int32) for x in cu_seqlens]
    actual = forward_and_gradients(
        inputs,
        window,
        backend,
        num_sink_tokens=num_sink_tokens,
        cu_seqlens_q=cu_seqlens[0],
        cu_seqlens_k=cu_seqlens[1],
    )
    mask = visible_pairs(window or Tk, num_sink_tokens, query_lengths, key_lengths)
    assert largest_error(actual, masked_softmax(inputs, mask)) <= 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_low_precision_with_sinks_is_as_accurate_as_its_operands(
    dtype: torch.dtype, tolerance: float
) -> None:
    inputs = [x.to(dtype).double() for x in make_inputs(1, 400, 6, 2, 64, 64)]
    inputs[0] = inputs[0][:, :300]
    mask = visible_pairs(70, 37, [300], [363])
    actual = forward_and_gradients([x.to(dtype) for x in inputs], 70, "blocked", num_sink_tokens=37)
    assert largest_error(actual, masked_softmax(inputs, mask)) <= tolerance


def test_sinks_see_each_other_in_both_directions() -> None:
    inputs = make_inputs(2, 9, 6, 2, 4, 3)
    expected = masked_softmax(inputs, torch.ones(9, 9, dtype=torch.bool))
    assert largest_error(output_and_gradients(bidirectional_attention, inputs), expected) <= 1e-14


def flex_layouts() -> list[flex.Visibility]:
    documents = Documents((0, 0, 90, 300, 301), (0, 70, 200, 410, 611))
    return [
        flex.Visibility(Tq=400, Tk=400, window=400, num_sink_tokens=0, documents=None),
        flex.Visibility(Tq=256, Tk=700, window=130, num_sink_tokens=0, documents=None),
        flex.Visibility(Tq=301, Tk=611, window=611, num_sink_tokens=128, documents=None),
        flex.Visibility(Tq=301, Tk=611, window=150, num_sink_tokens=77, documents=None),
        flex.Visibility(Tq=301, Tk=611, window=611, num_sink_tokens=130, documents=documents),
        flex.Visibility(Tq=301, Tk=611, window=40, num_sink_tokens=3, documents=documents),
    ]


@pytest.mark.parametrize("visibility", flex_layouts())
def test_flex_block_mask_says_what_is_visible(visibility: flex.Visibility) -> None:
    from torch.nn.attention.flex_attention import create_mask

    mask = flex.block_mask(visibility, torch.device("cpu"))
    N, documents = visibility.num_sink_tokens, visibility.documents
    query_lengths = documents.query_lengths if documents else [visibility.Tq]
    key_lengths = documents.key_lengths if documents else [visibility.Tk]
    expected = visible_pairs(visibility.window, N, query_lengths, key_lengths)
    assert torch.equal(create_mask(mask.mask_mod, 1, 1, *expected.shape, "cpu")[0, 0], expected)

    # The kernel visits partial blocks with the mask and full blocks without it, and no others.
    def blocks(number: Tensor, indices: Tensor) -> Tensor:
        visited = torch.zeros(indices.shape[2:], dtype=torch.bool)
        for row in range(visited.shape[0]):
            visited[row, indices[0, 0, row, : number[0, 0, row]].long()] = True
        return visited.repeat_interleave(128, 0).repeat_interleave(128, 1)[: visibility.Tq]

    partial = blocks(mask.kv_num_blocks, mask.kv_indices)
    full = blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    keys = expected.shape[1]
    assert not full[:, keys:].any() and not (partial & full).any()
    assert torch.equal((partial[:, :keys] & expected) | full[:, :keys], expected)
    assert full.any() == (N >= 128 or visibility.window >= 383)


@pytest.mark.parametrize("visibility", flex_layouts())
def test_flex_equals_a_masked_softmax_where_it_is_not_compiled(
    visibility: flex.Visibility, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flex, "_compiled_flex_attention", lambda: flex_attention)
    N, documents = visibility.num_sink_tokens, visibility.documents
    q, k, v = make_inputs(2 if documents is None else 1, N + visibility.Tk, 4, 2, 16, 16)
    q = q[:, : visibility.Tq]
    actual = flex.flex_softmax_attention(
        q, k, v, window=visibility.window, scale=0.25, num_sink_tokens=N, documents=documents
    )
    query_lengths = documents.query_lengths if documents else [visibility.Tq]
    key_lengths = documents.key_lengths if documents else [visibility.Tk]
    mask = visible_pairs(visibility.window, N, query_lengths, key_lengths)
    torch.testing.assert_close(actual, masked_softmax([q, k, v], mask)[0], rtol=0, atol=1e-12)


def _flash_attn_like(q: Tensor, k: Tensor, v: Tensor, window_size: tuple[int, int], scale: float) -> Tensor:
    """flash-attn's documented causal semantics: the last query stands at the last key, -1 is no limit."""
    left, right = window_size
    assert right in (0, -1)
    mask = visible_pairs(k.shape[1] if left == -1 else left + 1, 0, [q.shape[1]], [k.shape[1]])
    return masked_softmax([q * scale * q.shape[-1] ** 0.5, k, v], mask)[0]


@pytest.mark.parametrize(
    ("window", "num_sink_tokens", "lengths"),
    [
        (None, 0, [(60, 60)]),
        (20, 0, [(60, 80)]),
        (None, 7, [(60, 80)]),
        (None, 7, [(0, 10), (30, 45), (30, 30)]),
        (20, 0, [(0, 10), (30, 45), (30, 30)]),
    ],
)
def test_flash_attn_is_called_as_its_documentation_says(
    window: int | None, num_sink_tokens: int, lengths: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package runs on GPUs only: a stand-in with the documented meaning of its arguments takes its place.
    def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size):  # type: ignore[no-untyped-def]
        assert causal
        return _flash_attn_like(q, k, v, window_size, softmax_scale)

    def flash_attn_varlen_func(  # type: ignore[no-untyped-def]
        q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size
    ):
        assert causal and cu_q.dtype == cu_k.dtype == torch.int32
        assert cu_q[-1] == len(q) and cu_k[-1] == len(k) == len(v)
        assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
        documents = zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True)
        return torch.cat(
            [
                _flash_attn_like(q[None, a:b], k[None, c:d], v[None, c:d], window_size, softmax_scale)[0]
                for a, b, c, d in documents
            ]
        )

    package = types.ModuleType("flash_attn")
    vars(package).update(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    query_lengths, key_lengths = ([pair[i] for pair in lengths] for i in (0, 1))
    q, k, v = make_inputs(1, num_sink_tokens + sum(key_lengths), 4, 2, 6, 6)
    q = q[:, : sum(query_lengths)]
    documents = Documents(tuple(bounds(query_lengths)), tuple(bounds(key_lengths)))
    actual = flash_attn_softmax_attention(
        q,
        k,
        v,
        window=window,
        scale=0.3,
        num_sink_tokens=num_sink_tokens,
        documents=documents if len(lengths) > 1 else None,
    )
    mask = visible_pairs(window or sum(key_lengths), num_sink_tokens, query_lengths, key_lengths)
    expected = masked_softmax([q * 0.3 * 6**0.5, k, v], mask)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


class _LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("num_sink_tokens", [0, 16])
def test_blocked_never_makes_a_square_of_the_sequence(num_sink_tokens: int) -> None:
    T, window = 4096, 64
    inputs = [x.bfloat16() for x in make_inputs(1, T, 1, 1, 8, 8)]
    inputs[0] = inputs[0][:, num_sink_tokens:]
    with _LargestTensor() as largest:
        forward_and_gradients(inputs, window, "blocked", num_sink_tokens=num_sink_tokens)
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
        softmax_attention(**{n: torch.zeros(s) for n, s in shapes.items()}, window=window)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        ({"num_sink_tokens": -1}, "too few for num_sink_tokens=-1"),
        ({"num_sink_tokens": 1}, "v holds 5 tokens: too few for num_sink_tokens=1 and a key for each of 5"),
        ({"cu_seqlens_q": [0, 5]}, "cu_seqlens_q and cu_seqlens_k go together"),
        ({"cu_seqlens_q": [0, 4], "cu_seqlens_k": [0, 5]}, "cu_seqlens_q must rise from 0 to 5"),
        ({"cu_seqlens_q": [0, 5], "cu_seqlens_k": [0, 6, 5]}, "cu_seqlens_k must rise from 0 to 5"),
        ({"cu_seqlens_q": [0, 3, 5], "cu_seqlens_k": [0, 5]}, "must name the same documents"),
        ({"cu_seqlens_q": [0, 3, 5], "cu_seqlens_k": [0, 2, 5]}, "at least as many keys as queries"),
    ],
)
def test_layouts_that_do_not_fit_are_named(layout: dict[str, Any], sentence: str) -> None:
    x = torch.zeros(1, 5, 2, 4)
    with pytest.raises(ValueError) as error:
        softmax_attention(x, x, x, window=None, **layout)
    assert sentence in str(error.value)


def test_documents_of_several_rows_are_refused() -> None:
    x = torch.zeros(2, 5, 2, 4)
    with pytest.raises(ValueError, match="cu_seqlens need B = 1, not 2"):
        softmax_attention(x, x, x, window=None, cu_seqlens_q=[0, 5], cu_seqlens_k=[0, 5])


def _call(
    window: int | None, num_sink_tokens: int, dtype: str = "bfloat16", head_dim: int = 64, **more: Any
) -> SoftmaxAttentionCall:
    return SoftmaxAttentionCall(dtype, head_dim, head_dim, 100, window, num_sink_tokens, **more)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Packages that can be called; a test adds to them."""
    names: set[str] = set()
    monkeypatch.setattr(
        packages, "package_failure", lambda name: None if name in names else "is not installed"
    )
    return names


@pytest.mark.parametrize("has_flash", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("has_documents", [False, True])
def test_auto_takes_a_gpu_kernel_that_can_express_the_call(
    has_flash: bool, dtype: str, has_documents: bool, installed: set[str]
) -> None:
    installed |= {"triton", "flash_attn"} if has_flash else {"triton"}

    def choice(window: int | None, num_sink_tokens: int) -> str:
        call = _call(window, num_sink_tokens, dtype, has_documents=has_documents)
        return choose_backend("auto", call, "cuda")

    flash = has_flash and dtype == "bfloat16"
    full = "flex" if has_documents else "sdpa"
    assert choice(None, 0) == choice(None, 8) == choice(100, 8) == ("flash_attn" if flash else full)
    assert choice(30, 0) == ("flash_attn" if flash else "flex")
    assert choice(30, 8) == "flex"


def test_auto_does_without_flex_where_it_cannot_be_compiled(
    installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_backend("auto", _call(30, 8), "cuda") == "blocked"
    assert choose_backend("auto", _call(None, 8, has_documents=True), "cuda") == "sdpa"
    with pytest.raises(PlatformError, match="flex needs the package triton, which is not installed"):
        choose_backend("flex", _call(30, 8), "cuda")
    installed.add("triton")
    assert choose_backend("auto", _call(30, 8, head_dim=8), "cuda") == "blocked"
    with pytest.raises(ValueError, match="flex needs heads of width 16 or more, not 8; choose auto"):
        choose_backend("flex", _call(30, 8, head_dim=8), "cuda")
    # torch 2.6 has this name, and takes powers of 2 only.
    monkeypatch.setattr(flex_attention_module, "_supported_head_dim", bool, raising=False)
    assert choose_backend("auto", _call(30, 8, head_dim=96), "cuda") == "blocked"
    assert choose_backend("auto", _call(30, 8, head_dim=128), "cuda") == "flex"


def test_auto_gives_heads_too_wide_for_flash_attn_to_another_kernel(installed: set[str]) -> None:
    installed |= {"triton", "flash_attn"}
    assert choose_backend("auto", _call(None, 0, head_dim=512), "cuda") == "sdpa"
    assert choose_backend("auto", _call(30, 0, head_dim=256), "cuda") == "flash_attn"


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (_call(30, 8), "cannot combine 8 sink tokens with a window of 30; choose auto"),
        (_call(None, 0, "float32"), "needs float16 or bfloat16, not float32; choose auto"),
        (_call(None, 0, head_dim=512), "needs heads of one width up to 256 .* not 512 and 512; choose auto"),
    ],
    ids=["sinks and a window", "float32", "wide heads"],
)
def test_flash_attn_by_name_is_refused_where_it_cannot(
    call: SoftmaxAttentionCall, sentence: str, installed: set[str]
) -> None:
    installed.add("flash_attn")
    with pytest.raises(ValueError, match=f"softmax_attention=flash_attn {sentence}"):
        choose_backend("flash_attn", call, "cuda")


@pytest.mark.parametrize("backend", ["flash_attn", "flex"])
def test_gpu_backends_are_refused_on_cpu(backend: str) -> None:
    x = torch.zeros(1, 5, 2, 4)
    with pytest.raises(PlatformError, match=f"softmax_attention={backend} needs a GPU; choose auto"):
        softmax_attention(x, x, x, window=None, backend=backend)


def test_unknown_backend_is_named() -> None:
    x = torch.zeros(1, 5, 2, 4)
    with pytest.raises(ValueError, match="softmax_attention=triton is unknown: choose one of auto"):
        softmax_attention(x, x, x, window=None, backend="triton")


@pytest.mark.parametrize("num_sink_tokens", [0, 5, 16, 40])
@pytest.mark.parametrize("earlier", [0, 3, 64, 100])
def test_tiles_cover_every_visible_pair_once(num_sink_tokens: int, earlier: int) -> None:
    T, window = 336, 50
    layout = blocked._KeyLayout.of(T, T + earlier, window, num_sink_tokens)
    seen = torch.zeros(T, layout.first_query + T, dtype=torch.int)
    for tile in blocked._tiles(1, 1, T, 64, layout):
        C = tile.queries.stop - tile.queries.start
        visible = tile.mask_(torch.ones(1, C, tile.num_columns), 0.0)[0].int()
        tile.add_columns_(seen[tile.queries][None, None], visible)
    sinks, hidden, text = seen.split([num_sink_tokens, layout.text_start - num_sink_tokens, T + earlier], 1)
    assert not hidden.any()
    expected = visible_pairs(window, num_sink_tokens, [T], [T + earlier])
    assert torch.equal(torch.cat((sinks, text), dim=1), expected.int())
