"""The gated delta rule's module against a loop over tokens (arXiv 2412.06464, eq. 10) and transformers.

The module runs in float32, the loop in float64 on the same weights. Rounding grows with the length of the
sums, so outputs agree to 1e-5 of their largest value and gradients to 1e-4 of theirs; two layers in float32
agree to 1e-5.
"""

from __future__ import annotations

import importlib
import inspect
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.config.model import DeltaRuleActivation, GatedDeltaRuleConfig, ModelConfig
from spikingbrain_train.config.parallel import KernelConfig, ParallelConfig
from spikingbrain_train.config.run import Precision
from tests.distributed.pool import RankPool

if TYPE_CHECKING:
    from spikingbrain_train.parallel.process_groups import ProcessGroups

T, B, H, G, K = 83, 2, 6, 3, 8
HIDDEN, EPS = 24, 1e-5

QWEN3_NEXT = GatedDeltaRuleConfig(
    num_query_groups=H, short_convolution=4, activation=DeltaRuleActivation.silu, output_gate=True
)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases and q/k norms of the source": {"add_qkv_bias": True, "qk_layernorm": True},
    "convolution": {"gdn": GatedDeltaRuleConfig(short_convolution=3)},
    "as Qwen3-Next": {"gdn": QWEN3_NEXT},
}


def model_config(**options: Any) -> ModelConfig:
    return ModelConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=32,
        num_attention_heads=H,
        num_query_groups=G,
        kv_channels=K,
        vocab_size=64,
        max_position_embeddings=128,
        mixers=["gdn"],
        norm_epsilon=EPS,
        **options,
    )


def build(groups: ProcessGroups, model: ModelConfig) -> Any:
    """The module as a run begins with it."""
    from megatron.core.transformer.spec_utils import build_module

    from spikingbrain_train.models.kernels import resolve_kernels
    from spikingbrain_train.models.layer_specs import layer_build, layer_spec
    from spikingbrain_train.models.transformer_config import transformer_config

    config = transformer_config(model, ParallelConfig(), Precision.fp32, on_cpu=True)
    kernels = resolve_kernels(KernelConfig(), groups.accelerator)
    spec = layer_spec(layers(model)[0], layer_build(model, kernels)).submodules.self_attention
    return build_module(spec, config=config, layer_number=1)


def run_module(
    groups: ProcessGroups, model: ModelConfig, gate_bias: float = 0.5
) -> tuple[dict[str, Tensor], list[Tensor], dict[str, Tensor]]:
    """Weights; input, output, gradient of the input; gradients of the loss ``sum(output * cos(index))``."""
    mixer = build(groups, model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            # Norm weights around 1; everything else large enough that gates, heads and tokens differ.
            noise = torch.randn(parameter.shape, generator=generator)
            size = gate_bias if name == "linear_output_gate.bias" else 0.5
            parameter.copy_(1 + 0.3 * noise if "norm" in name else size * noise)
    hidden = torch.randn(T, B, HIDDEN, generator=generator).requires_grad_()
    output, output_bias = mixer(hidden)
    assert output_bias is None
    output.backward(loss_weights())
    weights = {name: w.detach() for name, w in mixer.state_dict().items() if isinstance(w, Tensor)}
    gradients = {name: p.grad for name, p in mixer.named_parameters()}
    return weights, [hidden.detach(), output.detach(), hidden.grad], gradients


def loss_weights(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(T * B * HIDDEN, dtype=torch.float64).cos().view(T, B, HIDDEN).to(dtype)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def loop_over_tokens(weights: dict[str, Tensor], hidden_TBD: Tensor, model: ModelConfig) -> Tensor:
    """The mixer with one state [B, K, K] a head, token by token, in the paper's form."""
    gdn = model.gdn
    qkv = hidden_TBD @ weights["linear_qkv.weight"].t()
    if model.add_qkv_bias:
        qkv = qkv + weights["linear_qkv.bias"]
    if gdn.short_convolution:
        taps = gdn.short_convolution
        padded = torch.cat((torch.zeros_like(qkv[: taps - 1]), qkv))
        kernel = weights["conv1d.weight"]
        qkv = sum(kernel[:, tap] * padded[tap : tap + len(qkv)] for tap in range(taps))
    if gdn.activation is DeltaRuleActivation.silu:
        qkv = qkv * torch.sigmoid(qkv)
    # Megatron's layout: for each group its query heads, its key, its value.
    groups = gdn.num_query_groups or G
    qkv = qkv.unflatten(-1, (groups, H // groups + 2, K))
    step = torch.log1p(torch.exp(hidden_TBD @ weights["linear_decay.weight"].t() + weights["dt_bias"]))
    decay = torch.exp(-torch.exp(weights["A_log"]) * step)
    beta = torch.sigmoid(hidden_TBD @ weights["linear_beta.weight"].t())
    identity, heads = torch.eye(K, dtype=hidden_TBD.dtype), []
    for head in range(H):
        group = head // (H // groups)
        q, k, v = qkv[:, :, group, head % (H // groups)], qkv[:, :, group, -2], qkv[:, :, group, -1]
        if model.qk_layernorm:
            q, k = norm(q, weights["q_layernorm.weight"]), norm(k, weights["k_layernorm.weight"])
        q, k = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        state, outputs = hidden_TBD.new_zeros(B, K, K), []
        for t in range(len(hidden_TBD)):
            write = beta[t, :, group, None, None]
            erase = identity - write * k[t].unsqueeze(-1) * k[t].unsqueeze(-2)
            state = decay[t, :, group, None, None] * erase @ state
            state = state + write * k[t].unsqueeze(-1) * v[t].unsqueeze(-2)
            outputs.append((q[t].unsqueeze(-2) @ state).squeeze(-2) / K**0.5)
        heads.append(norm(torch.stack(outputs), weights["out_norm.weight"]))
    mixed = torch.cat(heads, dim=-1)
    if gdn.output_gate:
        gate = hidden_TBD @ weights["linear_output_gate.weight"].t() + weights["linear_output_gate.bias"]
        mixed = mixed * gate * torch.sigmoid(gate)
    return mixed @ weights["linear_proj.weight"].t()


def assert_close(ours: Tensor, theirs: Tensor, bound: float) -> None:
    assert (ours.double() - theirs).abs().max() <= bound * theirs.abs().max()


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_module_computes_the_delta_rule(ranks: RankPool, settings: dict[str, Any]) -> None:
    model = model_config(**settings)
    ((weights, (hidden, output, grad_hidden), gradients),) = ranks.run(
        run_module, model, world_size=1, parallel=ParallelConfig()
    )
    leaves = {name: w.double().requires_grad_() for name, w in weights.items()}
    hidden = hidden.double().requires_grad_()
    expected = loop_over_tokens(leaves, hidden, model)
    assert_close(output, expected.detach(), 1e-5)
    expected.backward(loss_weights(torch.float64))
    assert_close(grad_hidden, hidden.grad, 1e-4)
    assert leaves.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, leaves[name].grad, 1e-4)


def test_module_computes_the_layer_of_transformers(ranks: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        modeling = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    except ImportError:
        pytest.skip("transformers has no Qwen3-Next before 4.57")
    # Where Triton is installed, it takes fla's kernel on CPUs, too, which have no driver for it.
    for name in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn"):
        if hasattr(modeling, name):
            monkeypatch.setattr(modeling, name, inspect.unwrap(getattr(modeling, name)))
    # Its output gate has no bias.
    ((weights, (hidden, output, _), _),) = ranks.run(
        run_module, model_config(gdn=QWEN3_NEXT), 0.0, world_size=1, parallel=ParallelConfig()
    )
    config = modeling.Qwen3NextConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        linear_num_value_heads=H,
        linear_num_key_heads=H,
        linear_key_head_dim=K,
        linear_value_head_dim=K,
        linear_conv_kernel_dim=4,
        rms_norm_eps=EPS,
        hidden_act="silu",
        layer_types=["linear_attention"],
    )
    layer = modeling.Qwen3NextGatedDeltaNet(config, 0)
    qkv = weights["linear_qkv.weight"].view(H, 3, K, HIDDEN)
    gate = weights["linear_output_gate.weight"].view(H, 1, K, HIDDEN)
    kernels = weights["conv1d.weight"].view(H, 3, K, 4).transpose(0, 1)
    layer.load_state_dict(
        {
            # Per head its query, key, value and output gate; its beta and its gate.
            "in_proj_qkvz.weight": torch.cat((qkv, gate), dim=1).reshape(-1, HIDDEN),
            "in_proj_ba.weight": torch.stack(
                (weights["linear_beta.weight"], weights["linear_decay.weight"]), dim=1
            ).reshape(-1, HIDDEN),
            "conv1d.weight": kernels.reshape(-1, 1, 4),
            "A_log": weights["A_log"],
            "dt_bias": weights["dt_bias"],
            "norm.weight": weights["out_norm.weight"],
            "out_proj.weight": weights["linear_proj.weight"],
        }
    )
    with torch.no_grad():
        theirs = layer(hidden.transpose(0, 1)).transpose(0, 1)
    assert_close(output, theirs.double(), 1e-5)


def _begins(groups: ProcessGroups, model: ModelConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log gates without input, a convolution of noise, noise, and the output gate; then other half-lives."""
    mixer = build(groups, model)
    zeros = torch.zeros(1, 1, HIDDEN)
    noise = torch.randn(1, 9, mixer.conv1d.weight.shape[0])
    with torch.no_grad():
        first = mixer.log_gate(zeros)[0, 0].clone()
        mixer.set_half_lives(torch.tensor([0.01, 0.01, 5.0, 20.0, 4000.0, 4000.0], dtype=torch.float64))
        gate = F.silu(mixer.linear_output_gate(torch.randn(1, 1, HIDDEN))[0])
        return first, mixer.conv1d(noise, None, None) - noise, gate, mixer.log_gate(zeros)[0, 0]


def test_a_layer_begins_with_half_lives_and_without_what_options_add(ranks: RankPool) -> None:
    options = GatedDeltaRuleConfig(
        short_convolution=4, output_gate=True, init_half_life_min=4, init_half_life_max=1024
    )
    ((first, change, gate, again),) = ranks.run(
        _begins, model_config(gdn=options), world_size=1, parallel=ParallelConfig()
    )
    torch.testing.assert_close(first, -math.log(2) / torch.tensor([4.0, 64.0, 1024.0]), rtol=1e-5, atol=0)
    assert change.abs().max() == 0
    torch.testing.assert_close(gate, torch.ones_like(gate))
    torch.testing.assert_close(again, -math.log(2) / torch.tensor([0.01, 10.0, 4000.0]), rtol=1e-4, atol=0)
