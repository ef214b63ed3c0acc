"""Feed-forwards that do not read the weights that meet zeros, against those that read everything.

Tolerances: sums of 64 to 192 products in another order: 1e-12 in float64 and 1e-5 in float32, of the largest
value.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spikingbrain_train.hf import zeros_sparsellama as zeros
from spikingbrain_train.hf.configuration_sparsellama import SparseLlamaConfig
from spikingbrain_train.hf.configuration_spikingbrain import SpikingBrainConfig
from spikingbrain_train.hf.modeling_sparsellama import SparseLlamaForCausalLM
from spikingbrain_train.hf.modeling_spikingbrain import SpikingBrainForCausalLM

D, F = 64, 192
SIZES = {
    "vocab_size": 97,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1, "moe_intermediate_size": 96}


def linears(bias: bool, dtype: torch.dtype) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Gate, up and down projection; the gate's bias closes about 85 % of it."""
    torch.manual_seed(0)
    gate, up = nn.Linear(D, F, dtype=dtype), nn.Linear(D, F, bias=bias, dtype=dtype)
    nn.init.constant_(gate.bias, -0.6)
    return gate, up, nn.Linear(F, D, bias=bias, dtype=dtype)


def everything(x: Tensor, gate: nn.Linear, up: nn.Linear, down: nn.Linear, threshold: float) -> Tensor:
    """As the paper has it."""
    gates = gate(x)
    return down(torch.where(gates >= threshold, gates, 0) * up(x) if threshold else torch.relu(gates) * up(x))


@pytest.mark.parametrize("threshold", [0.0, 0.05, 1e9])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@torch.no_grad()
def test_few_tokens_give_what_everything_gives(
    threshold: float, bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """A threshold that closes all gates leaves the bias."""
    parts = linears(bias, dtype)
    for shape in ((1, 1, D), (D,), (1, 2, D)):
        x = torch.randn(shape, dtype=dtype)
        expected = everything(x, *parts, threshold)
        found = zeros.sparse_mlp(x, *parts, zeros.FATReLU(threshold))
        assert found is not None and found.shape == x.shape
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@torch.no_grad()
def test_rows_of_closed_gates_are_not_read() -> None:
    """They hold what would show in any product; a gate that is NaN is not closed."""
    gate, up, down = linears(False, torch.float32)
    x = torch.randn(1, D)
    expected = everything(x, gate, up, down, 0.0)
    closed = gate(x)[0] <= 0
    up.weight[closed] = torch.nan
    down.weight[:, closed] = torch.nan
    found = zeros.sparse_mlp(x, gate, up, down, nn.ReLU())
    assert found is not None and (found - expected).abs().max() <= 1e-5
    gate.bias[0] = torch.nan
    assert torch.isnan(zeros.sparse_mlp(x, gate, up, down, nn.ReLU())).all()  # type: ignore[arg-type]


def refused(**change: Any) -> bool:
    parts = dict(zip(("gate", "up", "down"), linears(False, torch.float32), strict=True))
    arguments = {"x": torch.randn(1, D), **parts, "activation": nn.ReLU(), **change}
    return zeros.sparse_mlp(**arguments) is None


def test_what_cannot_skip_computes_everything() -> None:
    assert refused()  # with gradients
    with torch.no_grad():
        assert not refused()
        assert refused(x=torch.randn(zeros.FEW_TOKENS + 1, D))
        assert refused(activation=nn.SiLU())
        assert refused(gate=linears(False, torch.float32)[1])  # without the bias: half of it is open
        watched = linears(False, torch.float32)[1]
        watched.register_forward_hook(lambda *_: None)
        assert refused(up=watched)
        assert refused(x=torch.randn(1, D, dtype=torch.bfloat16))


def sparse_llama(**more: Any) -> PreTrainedModel:
    return SparseLlamaForCausalLM(SparseLlamaConfig(**SIZES, **more))


def spikingbrain(**more: Any) -> PreTrainedModel:
    layers = {"mixers": [["linear_attention"], ["full_attention"]], "feed_forwards": ["mlp", "moe"]}
    return SpikingBrainForCausalLM(SpikingBrainConfig(**SIZES, **layers, moe=EXPERTS, **more))


@pytest.mark.parametrize("make", [sparse_llama, spikingbrain])
@torch.no_grad()
def test_a_model_decodes_what_it_decodes_with_all_weights(
    make: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Token by token from a cache, and then trained and saved as if nothing had been laid out anew."""
    torch.manual_seed(0)
    model = make(hidden_act="fatrelu", hidden_act_param=1.5).eval()
    assert model.config.skip_zeros
    tokens = torch.randint(0, 97, (1, 12))
    whole = model(tokens).logits[0]
    products: list[bool] = []
    product = zeros.active_product

    def watched(*arguments: Any) -> Tensor | None:
        found = product(*arguments)
        products.append(found is not None)
        return found

    monkeypatch.setattr(zeros, "active_product", watched)
    cache, rows = None, []
    for token in tokens[0]:
        output = model(token.view(1, 1), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(output.logits[0, 0])
    assert sum(products) > 12  # of both layers
    assert (torch.stack(rows) - whole).abs().max() <= 1e-5 * whole.abs().max()

    with torch.enable_grad():
        model(tokens, labels=tokens).loss.backward()
    down = [
        p for name, p in model.named_parameters() if name.endswith("down_proj.weight") and p.grad is not None
    ]
    assert down and all(p.grad is not None and p.grad.shape == p.shape for p in down)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, skip_zeros=False)
    assert not again.config.skip_zeros
    products.clear()
    torch.testing.assert_close(again(tokens[:, :2]).logits, model(tokens[:, :2]).logits, atol=1e-4, rtol=1e-4)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
