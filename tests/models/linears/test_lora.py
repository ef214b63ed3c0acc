"""Adapters beside transformed projections against plain torch: which input they read, and their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from spikingbrain_train.config.linear_transforms import (
    Int8InputsConfig,
    Projection,
    SpikingConfig,
    TernaryConfig,
)
from spikingbrain_train.config.lora import LoraConfig
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig, ParallelLinearBackend
from spikingbrain_train.config.run import Precision
from spikingbrain_train.ops.spike_encoding import naive_spike_encoding
from tests.distributed.pool import RankPool
from tests.models.linears.test_spikes import FFN, HIDDEN, MODEL, K

if TYPE_CHECKING:
    from spikingbrain_train.parallel.process_groups import ProcessGroups

ADAPTED = replace(MODEL, spiking=SpikingConfig(), lora=LoraConfig(names=["a"], ranks=[3], alphas=[6.0]))
FC2 = [Projection.mlp_fc2]
MODELS: dict[str, ModelConfig] = {
    "plain": ADAPTED,
    "INT8 inputs": replace(ADAPTED, int8_inputs=Int8InputsConfig(FC2)),
    "ternary weights": replace(ADAPTED, ternary=TernaryConfig(FC2)),
    "both": replace(ADAPTED, int8_inputs=Int8InputsConfig(FC2), ternary=TernaryConfig(FC2)),
    "spikes": replace(ADAPTED, spiking=SpikingConfig(FC2, k=K)),
    "spikes, ternary weights": replace(ADAPTED, spiking=SpikingConfig(FC2, k=K), ternary=TernaryConfig(FC2)),
}


def tensors() -> dict[str, Tensor]:
    """Float64: W [HIDDEN, FFN], A [3, FFN], B [HIDDEN, 3], x [T, 1, FFN], gradient of the output."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"W": (HIDDEN, FFN), "A": (3, FFN), "B": (HIDDEN, 3), "x": (10, 1, FFN), "grad": (10, 1, HIDDEN)}
    return {
        key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in shapes.items()
    }


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    return value + (rounded - value).detach()


def int8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return straight_through(x, (x / scale).round() * scale)


def ternary(weight: Tensor) -> Tensor:
    scale = weight.abs().mean()
    return straight_through(weight, (weight / scale).round().clamp(-1, 1) * scale)


def of_plain_torch(model: ModelConfig) -> tuple[Tensor, ...]:
    """Output, and gradients of A, B and x."""
    W, A, B, x, grad = tensors().values()
    leaves = [each.requires_grad_() for each in (A, B, x)]
    read = naive_spike_encoding(x, K) if model.spiking.projections else x
    seen = int8(read) if model.int8_inputs.projections else read
    output = linear(seen, ternary(W) if model.ternary.projections else W)
    output = output + 6.0 / 3 * linear(linear(read, A), B)
    return (output.detach(), *torch.autograd.grad(output, leaves, grad))


def of_the_linear(groups: ProcessGroups, model: ModelConfig) -> tuple[Tensor, ...]:
    from spikingbrain_train.models.linears.parallel_linears import ParallelLinears
    from spikingbrain_train.models.transformer_config import transformer_config

    config = transformer_config(model, ParallelConfig(), Precision.fp32, on_cpu=True)
    made: Any = ParallelLinears(ParallelLinearBackend.megatron, model).row(Projection.mlp_fc2)
    module = made(
        *(FFN, HIDDEN),
        config=config,
        init_method=torch.nn.init.zeros_,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
    ).double()
    W, A, B, x, grad = tensors().values()
    factors = module.lora.down_proj
    with torch.no_grad():
        for parameter, value in ((module.weight, W), (factors.a_A, A), (factors.a_B, B)):
            parameter.copy_(value)
    module.weight.requires_grad_(False)
    output, _ = module(x.requires_grad_())
    return (output.detach(), *torch.autograd.grad(output, (factors.a_A, factors.a_B, x), grad))


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_reads_spikes_but_not_what_is_rounded_inside_the_linear(
    name: str, ranks: RankPool
) -> None:
    (found,) = ranks.run(of_the_linear, MODELS[name], world_size=1, parallel=ParallelConfig())
    for ours, expected in zip(found, of_plain_torch(MODELS[name]), strict=True):
        assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()
