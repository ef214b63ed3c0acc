"""The mixer module against a loop over tokens written from eq. 10-11 (SpikingBrain, arXiv 2509.05276).

The module runs in float32, the loop in float64 on the same weights. Rounding grows with the length of the
sums, so outputs agree to 1e-5 of their largest value and gradients to 1e-4 of theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.config.model import GatedLinearAttentionConfig, GateKind, ModelConfig
from spikingbrain_train.config.parallel import KernelConfig, ParallelConfig
from spikingbrain_train.config.run import Precision
from tests.distributed.pool import RankPool

if TYPE_CHECKING:
    from spikingbrain_train.parallel.process_groups import ProcessGroups

T, B, H, G, K = 37, 2, 6, 3, 8
HIDDEN, EPS = 24, 1e-5


def model_config(
    *, bias: bool = False, qk_norm: bool = False, options: dict[str, Any] | None = None
) -> ModelConfig:
    return ModelConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=32,
        num_attention_heads=H,
        num_query_groups=G,
        kv_channels=K,
        vocab_size=64,
        max_position_embeddings=64,
        mixers=["gla"],
        norm_epsilon=EPS,
        add_qkv_bias=bias,
        qk_layernorm=qk_norm,
        gla=GatedLinearAttentionConfig(**options or {}),
    )


def run_module(
    groups: ProcessGroups, model: ModelConfig
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Weights, input, output, gradients of input and weights for the loss ``sum(output * cos(index))``."""
    from megatron.core.transformer.spec_utils import build_module

    from spikingbrain_train.models.kernels import resolve_kernels
    from spikingbrain_train.models.layer_specs import layer_build, layer_spec
    from spikingbrain_train.models.transformer_config import transformer_config

    config = transformer_config(model, ParallelConfig(), Precision.fp32, on_cpu=True)
    kernels = resolve_kernels(KernelConfig(), groups.accelerator)
    spec = layer_spec(layers(model)[0], layer_build(model, kernels)).submodules.self_attention
    mixer = build_module(spec, config=config, layer_number=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            # Norm weights around 1; everything else large enough that gates, heads and tokens differ.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.5 * noise)
    hidden = torch.randn(T, B, HIDDEN, generator=generator).requires_grad_()
    output, output_bias = mixer(hidden)
    assert output_bias is None
    output.backward(loss_weights())
    weights = {name: w.detach() for name, w in mixer.state_dict().items() if isinstance(w, Tensor)}
    gradients = {name: p.grad for name, p in mixer.named_parameters()}
    return weights, hidden.detach(), output.detach(), hidden.grad, gradients


def loss_weights(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(T * B * HIDDEN, dtype=torch.float64).cos().view(T, B, HIDDEN).to(dtype)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def loop_over_tokens(weights: dict[str, Tensor], hidden_TBD: Tensor, model: ModelConfig) -> Tensor:
    """The mixer with one state [B, K, K] a head, token by token."""
    qkv = hidden_TBD @ weights["linear_qkv.weight"].t()
    if model.add_qkv_bias:
        qkv = qkv + weights["linear_qkv.bias"]
    # Megatron's layout: for each group its query heads, its key, its value.
    G = model.gla.num_query_groups or model.num_query_groups
    qkv = qkv.unflatten(-1, (G, H // G + 2, K))
    if model.gla.gate is GateKind.fixed:
        decay = weights["log_decay"].exp().unsqueeze(-1).expand(*hidden_TBD.shape[:2], G, K)
    else:
        low_rank = hidden_TBD @ weights["linear_gate_down_proj.weight"].t()
        gate = low_rank @ weights["linear_gate_up_proj.weight"].t() + weights["linear_gate_up_proj.bias"]
        decay = torch.sigmoid(gate).pow(1 / model.gla.gate_logit_normalizer).unflatten(-1, (G, K))
    heads = []
    for head in range(H):
        group = head // (H // G)
        q, k, v = qkv[:, :, group, head % (H // G)], qkv[:, :, group, -2], qkv[:, :, group, -1]
        if model.qk_layernorm or model.gla.qk_norm:
            q, k = norm(q, weights["q_layernorm.weight"]), norm(k, weights["k_layernorm.weight"])
        q, k = q.clamp(min=0), k.clamp(min=0)
        if model.gla.rotary:
            q, k = rotate(q, model.rotary_base), rotate(k, model.rotary_base)
        state = hidden_TBD.new_zeros(B, K, K)
        outputs = []
        for t in range(len(hidden_TBD)):
            state = decay[t, :, group].unsqueeze(-1) * state + k[t].unsqueeze(-1) * v[t].unsqueeze(-2)
            outputs.append((q[t].unsqueeze(-2) @ state).squeeze(-2) / K**0.5)
        heads.append(norm(torch.stack(outputs), weights["out_norm.weight"]))
    mixed = torch.cat(heads, dim=-1)
    if model.gla.output_gate:
        gate = hidden_TBD @ weights["linear_output_gate.weight"].t() + weights["linear_output_gate.bias"]
        mixed = mixed * gate * torch.sigmoid(gate)
    return mixed @ weights["linear_proj.weight"].t()


def rotate(x_TBK: Tensor, base: float) -> Tensor:
    """Pairs (i, i + K / 2) as complex numbers, turned by position * base^(-2i / K)."""
    half = x_TBK.shape[-1] // 2
    angle = torch.arange(len(x_TBK))[:, None] * base ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x_TBK[..., :half], x_TBK[..., half:]) * torch.polar(
        torch.ones_like(angle), angle
    ).unsqueeze(1)
    return torch.cat([turned.real, turned.imag], dim=-1)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"bias": True},
    "q/k norms of the source": {"qk_norm": True},
    "a group a head": {"bias": True, "options": {"num_query_groups": H}},
    "fixed decay": {"options": {"gate": GateKind.fixed}},
    "output gate": {"options": {"output_gate": True}},
    "rotary positions": {"options": {"rotary": True}},
    "q/k norms": {"options": {"qk_norm": True}},
}


def assert_close(ours: Tensor, theirs: Tensor, bound: float) -> None:
    assert (ours.double() - theirs).abs().max() <= bound * theirs.abs().max()


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_module_computes_the_gated_recurrence(ranks: RankPool, settings: dict[str, Any]) -> None:
    model = model_config(**settings)
    ((weights, hidden, output, grad_hidden, gradients),) = ranks.run(
        run_module, model, world_size=1, parallel=ParallelConfig()
    )
    leaves = {name: w.double().requires_grad_() for name, w in weights.items()}
    hidden = hidden.double().requires_grad_()
    expected = loop_over_tokens(leaves, hidden, model)
    assert_close(output, expected.detach(), 1e-5)
    expected.backward(loss_weights(torch.float64))
    assert_close(grad_hidden, hidden.grad, 1e-4)
    assert leaves.keys() - gradients.keys() == ({"log_decay"} if model.gla.gate is GateKind.fixed else set())
    for name, gradient in gradients.items():
        assert_close(gradient, leaves[name].grad, 1e-4)


def test_a_token_does_not_change_what_comes_before_it(ranks: RankPool) -> None:
    (changed,) = ranks.run(outputs_that_change, world_size=1, parallel=ParallelConfig())
    assert changed == list(range(T // 2, T))


def outputs_that_change(groups: ProcessGroups) -> list[int]:
    """Positions whose output changes when token T // 2 does."""
    from megatron.core.transformer.spec_utils import build_module

    from spikingbrain_train.models.kernels import resolve_kernels
    from spikingbrain_train.models.layer_specs import layer_build, layer_spec
    from spikingbrain_train.models.transformer_config import transformer_config

    model = model_config()
    config = transformer_config(model, ParallelConfig(), Precision.fp32, on_cpu=True)
    kernels = resolve_kernels(KernelConfig(), groups.accelerator)
    mixer = build_module(
        layer_spec(layers(model)[0], layer_build(model, kernels)).submodules.self_attention,
        config=config,
        layer_number=1,
    )
    with torch.no_grad():
        # Slow decay, so that the change is still visible at the end.
        mixer.linear_gate_up_proj.bias.fill_(6.0)
        hidden = torch.randn(T, 1, HIDDEN, generator=torch.Generator().manual_seed(0))
        other = hidden.clone()
        other[T // 2] += F.normalize(torch.ones(HIDDEN), dim=0)
        difference = (mixer(hidden)[0] - mixer(other)[0]).abs().amax(dim=(1, 2))
    return difference.nonzero().flatten().tolist()
