"""INT8 weights, keys and values in training.

The reference for weights is a model of plain linears whose parameters were rounded beforehand: rounding is
straight-through and cuts nothing off, so its gradients are those of the transformed one, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from spikingbrain_train.config.linear_transforms import (
    GateEncoding,
    Projection,
    QuantizationConfig,
    SpikingConfig,
)
from spikingbrain_train.config.model import ModelConfig, MoEConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.models.linears.int8_weights import Int8Weights, WeightErrors
from spikingbrain_train.ops.int8_groups import group_scales, int8_rounding
from tests.distributed.gradients import CASES, Case, assemble, loss_and_gradients
from tests.distributed.pool import RankPool

if TYPE_CHECKING:
    from spikingbrain_train.parallel.process_groups import ProcessGroups

GROUP = 16
"""Divides all inputs; two tensor-parallel ranks part the 48 of the down projection inside a group."""
TOLERANCE = 1e-5
EVERYWHERE = list(Projection)
SPIKES = SpikingConfig(EVERYWHERE, GateEncoding.each_matrix, k=3.0)
DENSE = CASES["7B-like, packed documents"].model
EXPERTS = replace(
    DENSE,
    num_layers=2,
    feed_forwards=["moe", "dense"],
    moe=MoEConfig(num_experts=4, router_topk=2, num_shared_experts=1),
    # With the usual one a value lies on the boundary between two INT8 numbers: the last bit decides.
    norm_epsilon=3e-2,
)
SPLITS = {
    "TP 2": (DENSE, ParallelConfig(tensor_model_parallel_size=2)),
    "TP 2 + sequence parallel, experts": (
        EXPERTS,
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    ),
    "PP 2": (DENSE, ParallelConfig(pipeline_model_parallel_size=2)),
    "CP 2": (DENSE, ParallelConfig(context_parallel_size=2)),
    "EP 2": (EXPERTS, ParallelConfig(expert_model_parallel_size=2)),
}


def quantized(model: ModelConfig, **settings: Any) -> ModelConfig:
    return replace(model, quantization=QuantizationConfig(EVERYWHERE, GROUP, **settings))


def gradients(
    groups: ProcessGroups, model: ModelConfig, parallel: ParallelConfig, rounded: bool = False
) -> tuple[float, list[Any]]:
    """Loss and gradients, read from ``main_grad`` of megatron-core's DDP after several micro-batches."""
    change = {"change_weights": round_projections} if rounded else {}
    return loss_and_gradients(groups, Case(model, packed=True), parallel, **change)


def round_projections(model: torch.nn.Module) -> None:
    """Round whole weights of everything that projects."""
    for name, parameter in model.named_parameters():
        if ".linear_" in name and name.endswith("weight"):
            parameter.copy_(int8_rounding(parameter, group_scales(parameter, GROUP)))


@pytest.mark.parametrize("spiking", [SpikingConfig(), SPIKES], ids=["alone", "behind spikes"])
def test_gradients_are_those_of_a_plain_model_with_rounded_weights(
    spiking: SpikingConfig, ranks: RankPool
) -> None:
    plain, one = replace(EXPERTS, spiking=spiking), ParallelConfig()
    ((loss, found),) = ranks.run(gradients, quantized(plain), one, world_size=1, parallel=one)
    ((expected_loss, expected),) = ranks.run(gradients, plain, one, True, world_size=1, parallel=one)
    ((other_loss, _),) = ranks.run(gradients, plain, one, world_size=1, parallel=one)
    assert loss == expected_loss != other_loss
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.key == theirs.key and torch.equal(ours.value, theirs.value), ours.key


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_model_computes_what_one_rank_does(name: str, ranks: RankPool) -> None:
    plain, parallel = SPLITS[name]
    model, one = quantized(plain, keys_and_values=True), ParallelConfig()
    ((expected_loss, shards),) = ranks.run(gradients, model, one, world_size=1, parallel=one)
    expected = assemble([shards])
    results = ranks.run(gradients, model, parallel, world_size=2, parallel=parallel)
    found = assemble([shards for _, shards in results])
    assert results[0][0] == pytest.approx(expected_loss, rel=TOLERANCE)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert (gradient - expected[key]).abs().max() <= TOLERANCE * expected[key].abs().max(), key


def attended(groups: ProcessGroups, model: ModelConfig) -> tuple[Tensor, list[Tensor]]:
    """What softmax layers give, and the keys and values that they attend to."""
    from spikingbrain_train.models.mixers import softmax_attention
    from tests.distributed.gradients import model_of_known_weights

    seen: list[Tensor] = []
    original = softmax_attention.context_parallel_softmax_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        seen.extend((k.detach(), v.detach()))
        return original(q, k, v, **kwargs)

    built = model_of_known_weights(groups, model, ParallelConfig()).eval()
    tokens = torch.arange(20).unsqueeze(0)
    softmax_attention.context_parallel_softmax_attention = spy
    try:
        with torch.no_grad():
            logits = built(tokens, torch.arange(20).unsqueeze(0), None)[0]
    finally:
        softmax_attention.context_parallel_softmax_attention = original
    return logits, seen


def test_softmax_layers_attend_to_int8_keys_and_values(ranks: RankPool) -> None:
    one = ParallelConfig()
    quantization = QuantizationConfig(keys_and_values=True)
    ((logits, seen),) = ranks.run(
        attended, replace(DENSE, quantization=quantization), world_size=1, parallel=one
    )
    ((plain_logits, plain_seen),) = ranks.run(attended, DENSE, world_size=1, parallel=one)
    assert len(seen) == len(plain_seen) > 0
    for x, plain in zip(seen[:2], plain_seen[:2], strict=True):
        scale = plain.abs().amax(-1, keepdim=True) / 127  # of a token and head
        assert torch.allclose(x, (plain / scale).round() * scale, rtol=1e-6)
    assert 0 < (logits - plain_logits).abs().max() < 0.05 * plain_logits.abs().max()


class _Whole:
    axis, parts, counts_here = None, 1, True


def test_a_share_of_the_way_is_annealed_and_errors_are_counted() -> None:
    model = quantized(DENSE)
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    transform = Int8Weights(model)
    transform.statistics = Int8Weights.new_statistics(torch.device("cpu"))
    whole: Any = _Whole()
    rounded = transform.weight(weight, whole)
    expected = ((rounded - weight).norm() / weight.norm()).item()
    assert transform.statistics.metrics()["weight_error"] == pytest.approx(expected)
    assert math.isnan(WeightErrors().metrics()["weight_error"])
    transform.share = 0.25
    assert torch.allclose(transform.weight(weight, whole), weight + 0.25 * (rounded - weight))
    transform.share = 0.0
    assert torch.equal(transform.weight(weight, whole), weight)
