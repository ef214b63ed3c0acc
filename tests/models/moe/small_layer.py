"""A small mixture-of-experts layer on the ranks of the pool, and the same mathematics as plain loops."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn.functional import silu

from spikingbrain_train.architecture.feed_forwards import FEED_FORWARDS
from spikingbrain_train.config.model import ModelConfig, MoEConfig
from spikingbrain_train.config.parallel import KernelConfig, ParallelConfig
from spikingbrain_train.config.run import Precision
from spikingbrain_train.models.feed_forwards.moe.spec import spec as spec_of_experts
from spikingbrain_train.models.kernels import resolve_kernels
from spikingbrain_train.models.layer_specs import layer_build
from spikingbrain_train.models.transformer_config import transformer_config
from spikingbrain_train.parallel.process_groups import ProcessGroups

HIDDEN, EXPERTS = 16, 4


def model_config(moe: MoEConfig) -> ModelConfig:
    """One layer of experts, narrower than the dense feed-forward would be."""
    moe.num_experts, moe.moe_ffn_hidden_size = EXPERTS, 12
    return ModelConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=20,
        num_attention_heads=2,
        num_query_groups=2,
        kv_channels=8,
        vocab_size=64,
        max_position_embeddings=64,
        feed_forwards=["moe"],
        moe=moe,
        init_method_std=0.3,
    )


def build_layer(groups: ProcessGroups, moe: MoEConfig, parallel: ParallelConfig) -> MoELayer:
    """The ``mlp`` of a layer, from the generators' current state."""
    model = model_config(moe)
    kernels = resolve_kernels(KernelConfig(), groups.accelerator)
    config = transformer_config(model, parallel, Precision.fp32, on_cpu=True)
    copies = parallel.replicate_expert_load is not None
    build = layer_build(model, kernels, replicates_experts=copies)
    spec: Any = spec_of_experts(FEED_FORWARDS["moe"], build)
    if isinstance(spec, ModuleSpec):
        layer = spec.module(config=config, submodules=spec.submodules, pg_collection=groups.collection)
    else:
        layer = spec(config=config, pg_collection=groups.collection)
    layer.set_layer_number(1)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # an earlier test may have left another one
    return layer


def inputs(length: int = 12, batch: int = 4) -> tuple[Tensor, Tensor]:
    """Hidden states and the gradient of the loss with respect to the layer's output, both [T, B, hidden]."""
    generator = torch.Generator().manual_seed(5)
    hidden, direction = torch.randn(2, length, batch, HIDDEN, generator=generator)
    return hidden, direction


def gradients(layer: MoELayer, hidden: Tensor, direction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and all gradients of ``(output * direction).sum()`` plus the router's losses."""
    hidden = hidden.clone().requires_grad_()
    output, _ = layer(hidden)
    output.backward(direction)
    assert hidden.grad is not None
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return output.detach(), {"input": hidden.grad, **grads}  # type: ignore[dict-item]


def loops_over_tokens_and_experts(
    layer: MoELayer, moe: MoEConfig, hidden: Tensor, direction: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """What :func:`gradients` should give on one rank, token by token and expert by expert."""
    weights = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    hidden = hidden.clone().requires_grad_()
    length, batch, _ = hidden.shape
    top_k = moe.router_topk

    def swiglu(prefix: str, x: Tensor) -> Tensor:
        gate, up = (weights[f"{prefix}.linear_fc1.weight"] @ x).chunk(2)
        return weights[f"{prefix}.linear_fc2.weight"] @ (silu(gate) * up)

    tokens = [(t, b) for t in range(length) for b in range(batch)]

    def inside(x: Tensor) -> Tensor:
        return (weights["router.hidden_weight"] @ x).tanh() if moe.router_hidden_size else x

    bias = layer.router.bias if moe.router_bias else torch.zeros(EXPERTS)
    logits = {token: weights["router.weight"] @ inside(hidden[token]) + bias for token in tokens}
    probs = {token: logits[token].exp() / logits[token].exp().sum() for token in tokens}
    chosen = {
        token: sorted(range(EXPERTS), key=lambda e, p=probs[token]: -float(p[e]))[:top_k] for token in tokens
    }
    loss = sum(moe.z_loss_coeff * logits[token].logsumexp(0) ** 2 for token in tokens)
    for b in range(batch):
        for e in range(EXPERTS):
            frequency = sum(e in chosen[t, b] for t in range(length)) / (length * top_k)
            probability = sum(probs[t, b][e] for t in range(length)) / length
            loss = loss + moe.aux_loss_coeff * length * EXPERTS * frequency * probability
    if moe.capacity_factor is not None:
        capacity = math.ceil(len(tokens) * top_k / EXPERTS * moe.capacity_factor)
        for e in range(EXPERTS):
            routed = sorted(
                (token for token in tokens if e in chosen[token]), key=lambda token: -float(probs[token][e])
            )
            for token in routed[capacity:]:
                chosen[token].remove(e)
    rows = []
    for token in tokens:
        x, p = hidden[token], probs[token]
        row = sum(p[e] * swiglu(f"experts.local_experts.{e}", x) for e in chosen[token])
        if moe.num_shared_experts:
            row = row + swiglu("shared_experts", x)
        rows.append(row if torch.is_tensor(row) else torch.zeros(HIDDEN))
    output = torch.stack(rows).view_as(hidden)
    loss = loss + (output * direction).sum()
    loss.backward()  # type: ignore[union-attr]
    return output.detach(), {"input": hidden.grad, **{n: w.grad for n, w in weights.items()}}  # type: ignore[dict-item]
