"""The two ways of mixing a sequence, against a token-by-token recurrence and a masked softmax in float64."""

from __future__ import annotations

import importlib
import inspect
import math
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spikingbrain_train.hf import ops_gla_swa as ops


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Eq. 10-11 as written, with k, v and gate repeated for every head."""
    heads_per_group = q.shape[2] // k.shape[2]
    k, v, log_gate = (x.repeat_interleave(heads_per_group, dim=2) for x in (k, v, log_gate))
    if state is None:
        state = torch.zeros(q.shape[0], q.shape[2], k.shape[3], v.shape[3], dtype=q.dtype)
    else:
        state = state.repeat_interleave(heads_per_group, dim=1)
    outputs = []
    for t in range(q.shape[1]):
        state = state * log_gate[:, t].exp()[..., None] + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] / math.sqrt(q.shape[-1]), state))
    return torch.stack(outputs, dim=1), state[:, ::heads_per_group]


def random_inputs(T: int, gate: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(T)
    B, H, G, K, V = 2, 6, 2, 8, 5
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, G, K), torch.randn(B, T, G, V)
    log_gate = F.logsigmoid(torch.randn(B, T, G, K)) / 16
    if gate == "strong":
        log_gate = -50 * torch.rand(B, T, G, K)
    elif gate == "mixed":
        # Nothing, a little and everything forgotten, side by side.
        log_gate = torch.tensor([0.0, -0.01, -50.0])[torch.randint(3, log_gate.shape)]
    return [x.to(dtype).requires_grad_() for x in (q, k, v, log_gate, torch.randn(B, G, K, V))]


@pytest.mark.parametrize("T", [2, 63, 64, 201])
@pytest.mark.parametrize("gate", ["learned", "strong", "mixed"])
@pytest.mark.parametrize("initial", [False, True])
def test_chunked_form_equals_the_recurrence_with_all_gradients(T: int, gate: str, initial: bool) -> None:
    inputs = random_inputs(T, gate)
    used = inputs if initial else inputs[:4]
    results = []
    for function in (ops.gated_linear_attention, recurrence):
        o, state = function(*inputs[:4], inputs[4] if initial else None)
        weights = torch.sin(torch.arange(o.numel(), dtype=o.dtype)).view(o.shape)
        results.append([o, state, *torch.autograd.grad((o * weights).sum() + state.square().sum(), used)])
    for actual, expected in zip(*results, strict=True):
        # float64 sums of at most some thousand terms: 1e-9 is far above rounding, far below any mistake.
        assert (actual - expected).abs().max() <= 1e-9 * max(1.0, expected.abs().max().item())


def test_chunked_form_is_finite_when_everything_is_forgotten() -> None:
    q, k, v, log_gate, state = random_inputs(130, "strong", torch.float32)
    forgotten = torch.full_like(log_gate, -torch.inf).requires_grad_()
    o, final_state = ops.gated_linear_attention(q, k, v, forgotten, state)
    gradients = torch.autograd.grad(o.sum() + final_state.sum(), [q, k, v, forgotten, state])
    assert all(x.isfinite().all() for x in (o, final_state, *gradients))
    # With nothing remembered, a token reads only what it writes itself.
    heads = torch.arange(6) // 3
    alone = (q * k[:, :, heads]).sum(-1, keepdim=True) * v[:, :, heads] / math.sqrt(8)
    torch.testing.assert_close(o, alone)


def test_float32_stays_exact_after_strong_decay() -> None:
    """A running sum of log gates would be -3200 here, where float32 resolves only 2e-4."""
    q, k, v, log_gate, state = (x.detach() for x in random_inputs(64, "learned", torch.float32))
    log_gate[:, :50] = -64.0
    expected, _ = recurrence(*(x.double() for x in (q, k, v, log_gate, state)))
    actual, _ = ops.chunked_gated_linear_attention(q / math.sqrt(8), k, v, log_gate, state)
    assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_text_may_be_read_in_pieces() -> None:
    inputs = [x.detach() for x in random_inputs(150, "learned")]
    whole, whole_state = ops.gated_linear_attention(*inputs)
    pieces, state = [], inputs[4]
    for start, stop in ((0, 1), (1, 70), (70, 71), (71, 150)):
        o, state = ops.gated_linear_attention(*(x[:, start:stop] for x in inputs[:4]), state)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, whole_state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("T", [1, 40])
def test_state_is_float32_for_half_precision_inputs(T: int) -> None:
    q, k, v, log_gate, _ = (x.detach() for x in random_inputs(T, "learned"))
    o, state = ops.gated_linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), log_gate.float(), None)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def flash_linear_attention() -> ModuleType:
    """Its gla module; importing it takes Triton, and with some versions of Triton a GPU too."""
    try:
        importlib.import_module("fla.ops.gla.naive")
        return importlib.import_module("fla.ops.gla")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"flash-linear-attention cannot be imported here: {error}")


def test_kernel_form_repeats_groups_and_returns_one_state_a_group() -> None:
    fla = flash_linear_attention()

    def kernel(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, **kwargs: object) -> object:
        # The naive form always scales by K^-0.5 and takes no scale.
        return fla.naive.naive_recurrent_gla(q * scale * math.sqrt(q.shape[-1]), k, v, g, **kwargs)

    q, k, v, log_gate, state = (x.detach() for x in random_inputs(33, "learned", torch.float32))
    actual = ops.gated_linear_attention_by_kernel(kernel, q / math.sqrt(8), k, v, log_gate, state)
    expected = recurrence(q, k, v, log_gate, state)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_the_kernel_gets_gates_that_it_can_sum() -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options: object) -> object:
        assert g.isfinite().all()
        return recurrence(q, k, v, g, options["initial_state"])

    q, k, v, log_gate, state = (x.detach() for x in random_inputs(33, "learned", torch.float32))
    log_gate[:, ::5] = -torch.inf
    actual = ops.gated_linear_attention_by_kernel(kernel, q, k, v, log_gate, state)
    torch.testing.assert_close(actual, recurrence(q, k, v, log_gate, state), rtol=0, atol=1e-5)


def test_kernel_of_the_installed_library_takes_the_arguments_used() -> None:
    parameters = inspect.signature(flash_linear_attention().chunk_gla).parameters
    assert list(parameters)[:4] == ["q", "k", "v", "g"]
    assert {"scale", "initial_state", "output_final_state"} <= set(parameters)


@pytest.mark.parametrize("window", [1, 3, 50, 512, 1200, None])
@pytest.mark.parametrize("T, S", [(1, 40), (20, 40), (40, 40), (1100, 1300)])
@pytest.mark.parametrize("padded", [False, True])
def test_causal_attention_equals_masked_softmax(window: int | None, T: int, S: int, padded: bool) -> None:
    torch.manual_seed(0)
    B, H, G, K = 2, 4, 2, 4
    q, k, v = (torch.randn(B, n, t, K, dtype=torch.float64) for n, t in ((H, T), (G, S), (G, S)))
    valid = torch.ones(B, S, dtype=torch.bool)
    if padded:
        valid[0, :11] = False
    query, key = torch.arange(S - T, S)[:, None], torch.arange(S)[None, :]
    visible = (key <= query) & (key > query - (window or S))
    visible = (visible & valid[:, None, None, :]).expand(B, H, T, S)
    scores = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) / 2.0
    expected = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v.repeat_interleave(2, dim=1)

    actual = ops.causal_attention(q, k, v, window, valid if padded else None)
    assert actual.isfinite().all()
    has_keys = visible.any(-1, keepdim=True).expand_as(expected)
    torch.testing.assert_close(actual[has_keys], expected[has_keys], rtol=0, atol=1e-12)


def test_windowed_attention_builds_no_mask_of_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    T, window, sizes = 5000, 100, []
    attention = F.scaled_dot_product_attention

    def recording(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *args: object) -> Tensor:
        sizes.append(mask.numel())
        return attention(q, k, v, mask, *args)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    ops.causal_attention(*torch.randn(3, 1, 1, T, 4), window)
    assert max(sizes) <= ops.QUERY_BLOCK_SIZE * (ops.QUERY_BLOCK_SIZE + window)
