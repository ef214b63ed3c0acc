"""Ternary weights and INT8 inputs in training.

The reference is a model of plain linears whose parameters were rounded beforehand, each Hugging Face tensor
on its own, as the conversion takes them apart: straight-through gradients are those of the transformed one.
Topologies against one rank are in tests/distributed/test_gradients.py.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from spikingbrain_train.architecture.layers import model_weights
from spikingbrain_train.config.linear_transforms import (
    GateEncoding,
    Projection,
    SpikingConfig,
    TernaryConfig,
)
from spikingbrain_train.config.model import ModelConfig, MoEConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.models.fused_tensors import transform_of
from spikingbrain_train.models.linears.int8_inputs import Int8Inputs
from spikingbrain_train.models.linears.joined_rows import JoinedRows, rows_of_projection
from spikingbrain_train.models.linears.ternary_weights import TernaryCounts, TernaryWeights
from tests.distributed.gradients import CASES, Case, assemble, loss_and_gradients
from tests.distributed.pool import RankPool

if TYPE_CHECKING:
    from spikingbrain_train.parallel.process_groups import ProcessGroups

TOLERANCE = 1e-5
EVERYWHERE = list(Projection)
SPIKES = SpikingConfig(EVERYWHERE, GateEncoding.each_matrix, k=3.0)
MODEL = replace(
    CASES["7B-like, packed documents"].model,
    num_layers=2,
    feed_forwards=["moe", "dense"],
    moe=MoEConfig(num_experts=4, router_topk=2, num_shared_experts=1),
)
ONE = ParallelConfig()
TP_2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)


def naively_rounded(weight: Tensor) -> Tensor:
    scale = weight.double().abs().mean().float()
    return (weight / scale).round().clamp(-1, 1) * scale


def gradients(
    groups: ProcessGroups, model: ModelConfig, parallel: ParallelConfig, rounded: bool = False
) -> tuple[float, list[Any]]:
    def change(built: torch.nn.Module) -> None:
        if rounded:
            round_projections(built, model)

    return loss_and_gradients(groups, Case(model, packed=True), parallel, change)


def round_projections(built: torch.nn.Module, model: ModelConfig) -> None:
    """Round whole tensors of everything that projects; routed experts have a parameter each."""
    parameters = dict(built.named_parameters())
    for _, weight in model_weights(model):
        if weight.projection is None:
            continue
        names = [weight.name]
        if weight.copies is not None and weight.copies.routed:
            before, _, after = weight.name.partition("experts.experts.")
            names = [f"{before}experts.local_experts.{n}.{after}" for n in range(model.moe.num_experts)]
        for name in names:
            parameter = parameters[name]
            rows = len(parameter) // sum(shape[0] for shape in weight.shapes)
            shapes = [(shape[0] * rows, parameter.shape[1]) for shape in weight.shapes]
            layout = transform_of(weight)
            parts = [naively_rounded(part) for part in layout.split(parameter, shapes, model)]
            parameter.copy_(layout.fuse(parts, model))


@pytest.mark.parametrize(
    "plain",
    [MODEL, replace(MODEL, spiking=SPIKES), replace(MODEL, mixers=["mamba", "gdn"])],
    ids=["alone", "behind spikes", "rows of other mixers"],
)
def test_gradients_are_those_of_a_plain_model_with_rounded_matrices(
    plain: ModelConfig, ranks: RankPool
) -> None:
    ternary = replace(plain, ternary=TernaryConfig(EVERYWHERE))
    ((expected_loss, expected),) = ranks.run(gradients, plain, ONE, True, world_size=1, parallel=ONE)
    ((other_loss, _),) = ranks.run(gradients, plain, ONE, world_size=1, parallel=ONE)
    ((loss, found),) = ranks.run(gradients, ternary, ONE, world_size=1, parallel=ONE)
    assert loss == pytest.approx(expected_loss, rel=1e-6) and abs(other_loss - loss) > 1e-3
    for ours, theirs in zip(found, expected, strict=True):
        off = (ours.value - theirs.value).abs().max()
        assert ours.key == theirs.key and off <= TOLERANCE * theirs.value.abs().max(), ours.key
    results = ranks.run(gradients, ternary, TP_2, world_size=2, parallel=TP_2)
    whole = assemble([expected])
    for key, gradient in assemble([shards for _, shards in results]).items():
        assert (gradient - whole[key]).abs().max() <= TOLERANCE * whole[key].abs().max(), key


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("ranks_of_tp", [1, 2])
def test_rows_belong_to_the_matrices_that_the_conversion_takes_apart(groups: int, ranks_of_tp: int) -> None:
    if groups % ranks_of_tp:
        pytest.skip("a rank holds whole query groups")
    model = replace(CASES["full attention"].model, num_query_groups=groups, feed_forwards=["dense"])
    config: Any = SimpleNamespace(
        num_attention_heads=4, num_query_groups=groups, kv_channels=8, gated_linear_unit=True
    )
    joined_weights = 0
    for _, weight in model_weights(model):
        if weight.projection is None:
            continue
        labels = [torch.full(shape, float(number)) for number, shape in enumerate(weight.shapes)]
        whole = transform_of(weight).fuse(labels, model)
        joined = rows_of_projection(Projection(weight.projection[0]))(config)
        if joined is None:
            assert len(labels) == 1
            continue
        joined_weights += 1
        # Of a SwiGLU a rank holds a part of each half, of query groups one stretch.
        halves = 2 if Projection(weight.projection[0]) is Projection.mlp_fc1 else 1
        for rank in range(ranks_of_tp):
            part = torch.cat([half.chunk(ranks_of_tp)[rank] for half in whole.chunk(halves)])
            assert torch.equal(joined.matrix_of_rows(len(part), part.device).float(), part[:, 0])
            for number, rows in enumerate(joined.parts(part)):
                assert (rows == number).all() and rows.numel() == labels[number].numel() // ranks_of_tp
    assert joined_weights == 2 * model.num_layers


def test_rows_that_are_no_blocks_are_not_taken_for_some() -> None:
    with pytest.raises(AssertionError, match="are no blocks"):
        JoinedRows((2, 1, 1), 8).matrix_of_rows(40, torch.device("cpu"))


class _Whole:
    axis, parts, counts_here, joined = None, 1, True, None

    def sum(self, numbers: Tensor) -> Tensor:
        return numbers

    max = sum


def test_a_share_of_the_way_is_annealed_and_errors_are_counted() -> None:
    whole: Any = _Whole()
    generator = torch.Generator().manual_seed(2)
    weight, x = torch.randn(4, 32, generator=generator), torch.randn(3, 32, generator=generator)
    ternary, inputs = TernaryWeights(MODEL), Int8Inputs(MODEL)
    ternary.statistics = TernaryWeights.new_statistics(torch.device("cpu"))
    rounded, codes = ternary.weight(weight, whole), inputs.input(x, whole)
    assert torch.allclose(rounded, naively_rounded(weight), rtol=1e-6)
    metrics = ternary.statistics.metrics()
    assert metrics["zeros"] == pytest.approx((rounded == 0).float().mean().item())
    assert metrics["weight_error"] == pytest.approx(((rounded - weight).norm() / weight.norm()).item())
    assert all(value != value for value in TernaryCounts().metrics().values())
    for share in (0.0, 0.25):
        ternary.share = inputs.share = share
        for transform, plain, end in ((ternary.weight, weight, rounded), (inputs.input, x, codes)):
            leaf = plain.clone().requires_grad_()
            found = transform(leaf, whole)
            assert torch.allclose(found, plain + share * (end - plain))
            found.sum().backward()
            assert torch.equal(leaf.grad, torch.ones_like(plain))
