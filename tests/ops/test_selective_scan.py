"""The selective scan: the chunked form against the recurrence, and both against transformers' mixers."""

from __future__ import annotations

import sys
import types
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import FalconMambaConfig, FalconMambaModel, MambaConfig, MambaModel

from spikingbrain_train.errors import PlatformError
from spikingbrain_train.ops.causal_convolution import causal_convolution
from spikingbrain_train.ops.selective_scan import choose_backend, linear_scan, selective_scan
from spikingbrain_train.runtime import packages
from tests.ops import recurrences
from tests.ops.recurrences import outputs_and_gradients

NAMES = ("y", "final_state", "grad_x", "grad_dt", "grad_A", "grad_B", "grad_C", "grad_initial_state")

STEPS = ("published", "none", "medium", "strong", "mostly weak")


def make_dt(kind: str, shape: tuple[int, ...]) -> Tensor:
    """Step sizes; with A down to -16, decays of exp(-800) at the strong ones."""
    x = torch.rand(shape, dtype=torch.float64)
    return {
        "published": 0.001 * 100**x,  # log-uniform in [0.001, 0.1], as Mamba begins
        "none": torch.zeros_like(x),
        "medium": 2 * x,
        "strong": 50 * x,
        "mostly weak": 50 * x**12,
    }[kind]


def make_inputs(B: int, T: int, D: int, N: int, kind: str, seed: int = 0, states: int = 0) -> list[Tensor]:
    """x, dt, A, B, C and initial state in float64; A as Mamba begins."""
    torch.manual_seed(seed)
    A = -torch.arange(1, N + 1, dtype=torch.float64).repeat(D, 1) * (0.5 + torch.rand(D, 1).double())
    x, write, read = (torch.randn(B, T, size).double() for size in (D, N, N))
    return [x, make_dt(kind, (B, T, D)), A, write, read, torch.randn(states or B, D, N).double()]


def forward_and_gradients(
    inputs: list[Tensor], backend: str, use: str = "both", cu_seqlens: list[int] | None = None
) -> list[Tensor]:
    """Output, final state and the gradients of all inputs, of what ``use`` names."""
    return outputs_and_gradients(selective_scan, inputs, use, backend=backend, cu_seqlens=cu_seqlens)


relative_errors = partial(recurrences.relative_errors, NAMES)


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(("T", "D"), [(1, 3), (7, 24), (133, 24), (259, 3), (67, 2100)])
def test_chunk_equals_recurrence_in_float64_for_any_decay(kind: str, T: int, D: int) -> None:
    # The bound of the project is 1e-9; float64 rounding over T steps stays orders of magnitude below it.
    # 2100 channels are above what is scanned in chunks side by side, and need several segments.
    inputs = make_inputs(2, T, D, 16, kind)
    errors = relative_errors(forward_and_gradients(inputs, "chunk"), forward_and_gradients(inputs, "naive"))
    assert max(errors.values()) <= 1e-11, errors


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_chunk_equals_recurrence_for_any_shape_and_documents(data: st.DataObject) -> None:
    B, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 150))
    D, N = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    cu_seqlens = None
    if data.draw(st.booleans()):
        B = 1
        cu_seqlens = [0, *sorted(data.draw(st.sets(st.integers(1, T), max_size=6)) | {T})]
    states = B if cu_seqlens is None else len(cu_seqlens) - 1
    kind, use = data.draw(st.sampled_from(STEPS)), data.draw(st.sampled_from(["output", "state", "both"]))
    inputs = make_inputs(B, T, D, N, kind, T, states)
    errors = relative_errors(
        forward_and_gradients(inputs, "chunk", use, cu_seqlens),
        forward_and_gradients(inputs, "naive", use, cu_seqlens),
    )
    assert max(errors.values()) <= 1e-9, errors


@pytest.mark.parametrize("elements", [1, 1 << 30], ids=["token by token", "most chunks"])
def test_any_number_of_chunks_gives_the_same_states(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    inputs = make_inputs(2, 131, 5, 4, "mostly weak")
    expected = forward_and_gradients(inputs, "naive")
    monkeypatch.setattr(linear_scan, "_ELEMENTS_OF_A_STEP", elements)
    errors = relative_errors(forward_and_gradients(inputs, "chunk"), expected)
    assert max(errors.values()) <= 1e-11, errors


@pytest.mark.parametrize("backend", ["chunk", "naive"])
def test_documents_do_not_see_each_other(backend: str) -> None:
    x, dt, A, write, read, state = make_inputs(1, 40, 6, 4, "published", states=3)
    bounds = [0, 1, 17, 40]
    y, final = selective_scan(
        x,
        dt,
        A,
        write,
        read,
        initial_state=state,
        output_final_state=True,
        backend=backend,
        cu_seqlens=torch.tensor(bounds),
    )
    assert final is not None
    for document, (start, end) in enumerate(pairwise(bounds)):
        tokens = slice(start, end)
        alone, behind = selective_scan(
            x[:, tokens],
            dt[:, tokens],
            A,
            write[:, tokens],
            read[:, tokens],
            initial_state=state[document : document + 1],
            output_final_state=True,
            backend="naive",
        )
        torch.testing.assert_close(y[:, tokens], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(final[document : document + 1], behind, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strong_decays_are_finite_in_low_precision(dtype: torch.dtype) -> None:
    # exp(-1e5) is 0 in any format; its gradient must be 0, not NaN.
    inputs = [x.to(dtype) for x in make_inputs(1, 65, 4, 16, "strong")]
    inputs[1] = inputs[1].float() * 1e3
    for value in forward_and_gradients(inputs, "chunk"):
        assert value.isfinite().all()


def test_memory_for_the_backward_pass_is_inputs_and_few_states() -> None:
    B, T, D, N = 1, 4096, 64, 16
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    leaves = [x.float().requires_grad_() for x in make_inputs(B, T, D, N, "published")[:5]]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        selective_scan(*leaves, backend="chunk")
    inputs = sum(x.numel() for x in leaves)
    # All states would be T * D * N; a state is kept every 1024 tokens here.
    assert sum(kept) <= inputs + T * D * N // 512


def test_skip_connection_adds_the_input() -> None:
    *inputs, _ = make_inputs(2, 9, 5, 3, "medium")
    D = torch.randn(5).double()
    plain, _ = selective_scan(*inputs)
    skipped, _ = selective_scan(*inputs, D=D)
    torch.testing.assert_close(skipped, plain + D * inputs[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["Mamba", "Falcon-Mamba"])
def test_mixer_of_transformers_is_convolution_and_scan(kind: str) -> None:
    """transformers' own layer, fp32, against ours of its weights: 24 tokens of rounding."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 24, "state_size": 5, "conv_kernel": 4, "num_hidden_layers": 1, "vocab_size": 9}
    falcon = kind == "Falcon-Mamba"
    config = FalconMambaConfig(**sizes) if falcon else MambaConfig(**sizes)
    model = FalconMambaModel(config) if falcon else MambaModel(config)
    mixer = model.layers[0].mixer.eval()
    hidden_states = torch.randn(2, 24, 24)
    with torch.no_grad():
        expected = mixer(hidden_states)
        x, z = mixer.in_proj(hidden_states).chunk(2, dim=-1)
        x, _ = causal_convolution(x, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias)
        x = F.silu(x)
        dt, B, C = mixer.x_proj(x).split([mixer.time_step_rank, 5, 5], dim=-1)
        if falcon:
            dt, B, C = (F.rms_norm(each, each.shape[-1:], eps=config.mixer_rms_eps) for each in (dt, B, C))
        dt, A = F.softplus(mixer.dt_proj(dt)), -mixer.A_log.exp()
        for backend in ("chunk", "naive"):
            y, _ = selective_scan(x, dt, A, B, C, D=mixer.D, backend=backend)
            actual = mixer.out_proj(y * F.silu(z))
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_auto_is_the_chunked_form_on_cpu() -> None:
    assert choose_backend("auto", torch.float32, "cpu", 16) == "chunk"


def test_kernel_is_chosen_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "package_failure", lambda name: None)
    assert choose_backend("auto", torch.bfloat16, "cuda", 16) == "mamba_ssm"
    assert choose_backend("auto", torch.bfloat16, "cuda", 16, passes_states=True) == "chunk"
    assert choose_backend("auto", torch.float64, "cuda", 16) == "chunk"
    with pytest.raises(ValueError, match="selective_scan=mamba_ssm takes state_size up to 256, not 300"):
        choose_backend("mamba_ssm", torch.bfloat16, "cuda", 300)
    with pytest.raises(ValueError, match="selective_scan=mamba_ssm begins with empty states"):
        choose_backend("mamba_ssm", torch.bfloat16, "cuda", 16, passes_states=True)


def test_kernel_needs_a_gpu() -> None:
    with pytest.raises(PlatformError, match="selective_scan=mamba_ssm needs a GPU"):
        choose_backend("mamba_ssm", torch.float32, "cpu", 16)


def test_kernel_is_called_as_its_reference_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """mamba_ssm's ``selective_scan_ref`` written down again, in the place of its kernel."""
    from spikingbrain_train.ops.selective_scan.mamba_ssm import mamba_ssm_selective_scan

    def selective_scan_fn(u, delta, A, B, C, *, return_last_state):  # noqa: ANN001, ANN202
        assert A.dtype == torch.float32 and return_last_state
        assert {each.dtype for each in (u, delta, B, C)} == {u.dtype}
        assert all(each.stride(-1) == 1 for each in (u, delta, B, C))
        decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
        update = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
        state, ys = A.new_zeros((u.shape[0], *A.shape)), []
        for t in range(u.shape[2]):
            state = decay[:, :, t] * state + update[:, :, t]
            ys.append(torch.einsum("bdn,bn->bd", state, C[:, :, t]))
        return torch.stack(ys, dim=2), state

    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["mamba_ssm.ops.selective_scan_interface"].selective_scan_fn = selective_scan_fn
    inputs = [x.float() for x in make_inputs(2, 11, 6, 4, "published")[:5]]
    y, state = mamba_ssm_selective_scan(*inputs)
    expected, expected_state = selective_scan(*inputs, output_final_state=True, backend="naive")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-6)


def test_wrong_shapes_are_named() -> None:
    x, dt, A, write, read, state = make_inputs(2, 5, 4, 3, "medium")
    with pytest.raises(ValueError, match=r"B must be \[2, 5, 3\] to go with x and A, not \[2, 5, 2\]"):
        selective_scan(x, dt, A, write[..., :2], read)
    with pytest.raises(ValueError, match=r"initial_state must be \[2, 4, 3\]"):
        selective_scan(x, dt, A, write, read, initial_state=state[:1])
    with pytest.raises(ValueError, match="needs at least one token"):
        selective_scan(x[:, :0], dt[:, :0], A, write[:, :0], read[:, :0])
    with pytest.raises(ValueError, match="cu_seqlens needs B = 1, not 2"):
        selective_scan(x, dt, A, write, read, cu_seqlens=[0, 5])
    with pytest.raises(ValueError, match="must rise from 0 to T = 5"):
        selective_scan(x[:1], dt[:1], A, write[:1], read[:1], cu_seqlens=[0, 5, 5])
