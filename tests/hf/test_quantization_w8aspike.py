"""INT8 weights and spikes of an export: integers multiplied as such, against plain float64 arithmetic."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from spikingbrain_train.hf import counts_w8aspike, products_w8aspike
from spikingbrain_train.hf.kernels_w8aspike import Fbgemm, IntMM, Kernel, OneDnn, is_exact
from spikingbrain_train.hf.quantization_w8aspike import (
    W8ASpikeEmbedding,
    W8ASpikeLinear,
    group_scales,
    int8_vectors,
    joint_outputs,
    quantize_modules,
    round_weight,
)
from spikingbrain_train.ops import int8_groups
from spikingbrain_train.ops.spike_encoding import naive_spike_encoding
from tests.hf.test_exported_folder import export

K = 3.0


def quantized(linear: nn.Linear, group_size: int | None, activation: str) -> W8ASpikeLinear:
    has_bias = linear.bias is not None
    made = W8ASpikeLinear(linear.in_features, linear.out_features, has_bias, group_size, activation, K)
    with torch.no_grad():
        made.weight_scale.copy_(group_scales(linear.weight, group_size))
        made.weight.copy_(round_weight(linear.weight, made.weight_scale))
        if made.bias is not None:
            made.bias.copy_(linear.bias)
    return made


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    """Two texts of three tokens; one channel counts far beyond what INT8 numbers hold."""
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(1))
    x[1, 2, 7] = 400.0
    return x.to(dtype)


def expected(made: W8ASpikeLinear, x: Tensor, activation: str) -> Tensor:
    wide = x.double()
    if activation == "spikes":
        wide = naive_spike_encoding(x.float(), K).double()
    elif activation != "float":
        # Divided in float32: in float64, one of some thousand 16-bit numbers is on the other side of a half.
        unit = x.float().abs().amax(-1, keepdim=True) / (127 if activation == "int8" else 32384)
        wide = (x.float() / unit).round().double() * unit.double()
    width = made.in_features // made.weight_scale.shape[1]
    weight = made.weight.double() * made.weight_scale.double().repeat_interleave(width, 1)
    return F.linear(wide, weight, None if made.bias is None else made.bias.double())


KERNELS = {
    "oneDNN": OneDnn(127),
    "oneDNN, 64": OneDnn(64),
    "FBGEMM": Fbgemm(),
    "torch._int_mm": IntMM(),
}


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Each kernel that is exact here, for few tokens and for many."""
    found = KERNELS[request.param]
    if not is_exact(found):
        pytest.skip(f"{request.param} is not exact on this CPU, or not in this torch")
    for module in (counts_w8aspike, products_w8aspike):
        monkeypatch.setattr(module, "kernels", lambda: (found, found))
    return found


def test_kernels_that_cut_sums_off_are_found(kernel: Kernel) -> None:
    """The largest sums of two, of sixteen and of 4096 products, against plain integers."""
    for inputs in (2, 16, 4096):
        digits = torch.full((5, inputs), kernel.largest)
        digits[1] *= -1
        digits[2, ::2] *= -1
        codes = torch.full((24, inputs), 127, dtype=torch.int8)
        codes[::2] *= -1
        codes[::3, ::2] *= -1
        packed = kernel.pack(codes, torch.ones(24))
        found = kernel.product(kernel.digits(digits), packed)
        assert torch.equal(found.double(), (digits @ codes.long().t()).float().double())


@pytest.mark.parametrize("tokens", [1, 3, 6, 700])
@pytest.mark.parametrize("group_size", [32, 96, None, 128])
@pytest.mark.parametrize("activation", ["spikes", "int8", "int16", "float"])
def test_the_product_is_that_of_whole_numbers(
    activation: str, group_size: int | None, tokens: int, kernel: Kernel
) -> None:
    torch.manual_seed(0)
    made = quantized(nn.Linear(96, 640, bias=group_size == 32), group_size, activation)
    x = inputs()[1:] if tokens == 3 else inputs() if tokens == 6 else torch.randn(1, tokens, 96)
    with torch.no_grad():
        found = made(x)
    reference = expected(made, x, activation)
    assert found.shape == (*x.shape[:2], 640) and found.dtype == torch.float32
    assert (found - reference).abs().max() <= 2e-6 * reference.abs().max()


def test_counts_of_any_size_are_split_into_digits(kernel: Kernel) -> None:
    """One channel of 20,000 has all spikes of a token: 60,000 of them."""
    made = quantized(nn.Linear(20_000, 3, bias=False), 5000, "spikes")
    x = torch.zeros(7, 20_000)
    x[:, 5] = torch.arange(1.0, 8.0)
    with torch.no_grad():
        for tokens in (1, 4, 7):
            reference = expected(made, x[:tokens], "spikes")
            assert (made(x[:tokens]) - reference).abs().max() <= 2e-6 * reference.abs().max()


@pytest.mark.parametrize("tokens", [1, 4, 9])
@pytest.mark.parametrize("group_size", [32, None])
def test_linears_that_read_the_same_give_what_each_gives(
    group_size: int | None, tokens: int, kernel: Kernel
) -> None:
    torch.manual_seed(0)
    linears = [nn.Linear(96, rows, bias=rows != 16) for rows in (40, 16, 24)]
    made = [quantized(linear, group_size, "spikes") for linear in linears]
    x = torch.randn(1, tokens, 96)
    with torch.no_grad():
        for _ in range(2):
            for found, linear in zip(joint_outputs(made, x), made, strict=True):
                assert torch.allclose(found, linear(x), rtol=0, atol=2e-6 * float(linear(x).abs().max()))
            made[1].weight.copy_(-made[1].weight)  # seen at the next call
            made[2].bias += 1
        made[0].activation = "int8"
        assert all(
            torch.equal(found, linear(x)) for found, linear in zip(joint_outputs(made, x), made, strict=True)
        )
        read = []
        handle = made[1].register_forward_hook(lambda *_: read.append(1))
        joint_outputs(made, x)
        handle.remove()
    assert read == [1], "whoever watches one of them sees it called"


def test_a_bias_is_trained_where_the_input_is_not() -> None:
    made = quantized(nn.Linear(96, 40), 32, "spikes")
    made(inputs()).sum().backward()
    assert torch.equal(made.bias.grad, torch.full((40,), 6.0))


@pytest.mark.parametrize("group_size", [32, None])
def test_the_float_form_has_the_same_values_and_a_straight_gradient(group_size: int | None) -> None:
    made = quantized(nn.Linear(96, 40), group_size, "spikes")
    x = inputs().requires_grad_()
    y = made(x)
    with torch.no_grad():
        assert (y - made(x)).abs().max() <= 2e-6 * y.abs().max()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(gradient, made.float_weight().sum(0).expand_as(x), rtol=1e-5)


def test_a_bfloat16_model_multiplies_the_same_integers() -> None:
    made = quantized(nn.Linear(96, 40), 32, "spikes")
    with torch.no_grad():
        exact = made(inputs(torch.bfloat16).float())
        found = copy.deepcopy(made).to(torch.bfloat16)(inputs(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() <= 2**-7 * exact.abs().max()


def test_changed_weights_are_packed_anew_and_inputs_encoded_anew() -> None:
    made = quantized(nn.Linear(96, 40, bias=False), 32, "spikes")
    x = inputs()
    with torch.no_grad():
        before = made(x)
        made.weight.copy_(-made.weight)
        assert torch.equal(made(x), -before)
        x *= 2
        assert torch.equal(made(x), -2 * before)


def test_codes_are_those_of_training() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    scales = group_scales(weight, 16)
    assert torch.equal(scales, int8_groups.group_scales(weight, 16))
    assert torch.equal(round_weight(weight, scales).float(), int8_groups.int8_codes(weight, scales))
    assert torch.equal(int8_vectors(weight), int8_groups.int8_vectors(weight))


SETTINGS = {
    "quant_method": "w8aspike",
    "group_size": 16,
    "linears": {"q_proj": "spikes", "gk_proj.0": "spikes", "down_proj": "int8", "lm_head": "int8"},
    "k": K,
    "embeddings": True,
    "keys_and_values": True,
}


def filled(model: nn.Module) -> nn.Module:
    """Random codes and scales in place of empty ones."""
    generator = torch.Generator().manual_seed(3)
    for each in model.modules():
        if isinstance(each, (W8ASpikeLinear, W8ASpikeEmbedding)):
            codes = torch.randint(-127, 128, each.weight.shape, generator=generator, dtype=torch.int8)
            each.weight.data = codes
            scales = 0.004 * torch.rand(each.weight_scale.shape, generator=generator) + 0.001
            each.weight_scale.data = scales.bfloat16().float()
    return model


def test_a_folder_loads_computes_and_generates_with_int8_weights(
    random_model: Callable, tmp_path: Path
) -> None:
    model = random_model(attention_bias=False)
    model.config.w8aspike = SETTINGS
    quantize_modules(model, SETTINGS)
    for each in model.modules():
        if hasattr(each, "int8_keys_and_values"):
            each.int8_keys_and_values = True
    filled(model)
    export(model, tmp_path / "export")
    assert json.loads((tmp_path / "export/config.json").read_text())["quantization_config"] == SETTINGS
    ids = torch.arange(20).view(2, 10)
    for dtype in (torch.float32, torch.bfloat16):
        loaded, loading = AutoModelForCausalLM.from_pretrained(
            tmp_path / "export", trust_remote_code=True, torch_dtype=dtype, output_loading_info=True
        )
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
        block = loaded.model.layers[1].attn
        assert block.q_proj.weight.dtype == torch.int8 and block.q_proj.weight_scale.dtype == dtype
        assert type(block.o_proj) is nn.Linear and block.int8_keys_and_values
        with torch.no_grad():
            found, reference = loaded(ids).logits.float(), model(ids).logits
        bound = 1e-5 if dtype == torch.float32 else 0.2  # counts on a boundary go either way
        assert (found - reference).norm() <= bound * reference.norm()
    written = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    reread = ids
    for _ in range(6):
        with torch.no_grad():
            reread = torch.cat([reread, model(reread).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, reread), "with a cache as without"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "int9"}, 'quant_method "int9"'),
        ({"group_size": 24}, "group_size 24 does not divide the 32 inputs"),
        ({"linears": {"q_proj": "bits"}}, 'activation "bits"'),
    ],
)
def test_what_it_does_not_compute_is_refused(random_model: Callable, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quantize_modules(random_model(), SETTINGS | changes)
