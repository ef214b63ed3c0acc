"""An L1 loss inside feed-forwards: the loss written out, every topology, its schedule, its metrics.

Tolerances: 1e-5 of losses and largest gradients, as in test_gradients.py. Shares of zeros: 1e-3, six of the
6144 products of a layer; a gate that is almost 0 has either sign, as rounding decides.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from spikingbrain_train.config.model import ActivationFunc
from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.stage import SparsityConfig
from spikingbrain_train.reporting.metrics import read_metrics
from tests.distributed.gradients import (
    CASES,
    LENGTH,
    Case,
    Shard,
    _shards,
    assemble,
    model_of_known_weights,
    whole_batches,
)
from tests.distributed.pool import RankPool
from tests.distributed.sharding_engines import case, fsdp
from tests.distributed.small_runs import MODEL, checkpoint_config, run_config, train
from tests.distributed.test_gradients import assert_equal, result
from tests.distributed.test_resume import _interrupt_after

if TYPE_CHECKING:
    from spikingbrain_train.parallel.process_groups import ProcessGroups

TOLERANCE, OF_ZEROS = 1e-5, 1e-3
ONE_RANK = ParallelConfig()
RELU = replace(MODEL, activation_func=ActivationFunc.relu)
SCHEDULE = SparsityConfig([0.02, 0.08, 0.08, 0.32], [1, 3, 4, 8])
"""Small enough that some products are left: learning rates here are large."""
QUARTER = (1 - math.sqrt(0.5)) / 2
"""Of a rise, after a quarter of its stage: the sine of -pi / 4."""
FACTORS = [0.02, 0.02, 0.05, 0.08, 0.08, 0.08 + 0.24 * QUARTER, 0.2, 0.32 - 0.24 * QUARTER]
"""Of the first eight steps."""
TOPOLOGIES: dict[str, tuple[int, ParallelConfig]] = {
    "TP 2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "TP 2 + sequence parallel": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "PP 2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "CP 2": (2, ParallelConfig(context_parallel_size=2)),
    "DP 2, distributed optimizer": (2, ParallelConfig(use_distributed_optimizer=True)),
    "DP 2, FSDP": (2, fsdp()),
}


def _written_out(groups: ProcessGroups, case: Case) -> tuple[float, list[Shard]]:
    """Loss and gradients of a case by autograd alone: products and penalties of plain operations."""
    from spikingbrain_train.data.loader import local_micro_batch
    from spikingbrain_train.models.feed_forwards.gated_activation import activations_in
    from spikingbrain_train.ops.gated_activation import naive_gated_relu

    model = model_of_known_weights(groups, case.model, ONE_RANK).train()
    moe, width = case.model.moe, case.model.ffn_hidden_size
    penalties: list[torch.Tensor] = []

    def write_out(module: torch.nn.Module, inputs: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
        product = naive_gated_relu(inputs[0])
        in_experts = id(module) in of_experts
        channels = (moe.router_topk + moe.num_shared_experts) * width if in_experts else width
        penalties.append(case.l1_factor * product.abs().sum() / channels)
        return product

    of_experts = {
        id(each)
        for layer in model.decoder.layers
        if hasattr(layer.mlp, "router")
        for each in activations_in(layer)
    }
    for activation in activations_in(model):
        activation.register_forward_hook(write_out)
    total, tokens, routers = torch.zeros(()), 0.0, 0.0
    text = LENGTH - case.model.num_sink_tokens
    for whole in whole_batches(case, text, 0, 1):
        batch = local_micro_batch(
            whole,
            groups.device,
            num_sink_tokens=case.model.num_sink_tokens,
            context_parallel_rank=0,
            context_parallel_size=1,
        )
        loss, _ = model(batch.tokens, batch.labels, batch.loss_mask, layout=batch.layout)
        total, tokens = total + loss, tokens + batch.loss_mask.sum().item()
    (total + sum(penalties)).backward()
    for module in model.modules():
        if hasattr(module, "statistics_sums"):
            routers += module.auxiliary_loss().item()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.grad / tokens  # type: ignore[operator]
    shards = [
        Shard(shard.key, shard.global_shape, shard.global_offset, shard.data.clone())  # type: ignore[union-attr]
        for shard in _shards(model)
    ]
    return ((total + sum(penalties)).item() + routers) / tokens, shards


@pytest.mark.parametrize("name", ["ReLU, L1", "ReLU, experts, L1"])
def test_what_is_optimised_is_the_loss_written_out(ranks: RankPool, name: str) -> None:
    case = CASES[name]
    ((loss, shards),) = ranks.run(_written_out, case, world_size=1, parallel=ONE_RANK)
    found = result(ranks, case, ONE_RANK)
    assert_equal(found, (loss, assemble([shards])))
    without = result(ranks, replace(case, l1_factor=0.0), ONE_RANK)
    assert found[0] > without[0] + 0.1


@pytest.mark.parametrize("level", [level for level in Recompute if level is not Recompute.none])
def test_recomputation_changes_nothing(ranks: RankPool, level: Recompute) -> None:
    case = CASES["ReLU, experts, L1"]
    assert_equal(result(ranks, case, ParallelConfig(recompute=level)), result(ranks, case, ONE_RANK))


def _config(folder: Path, text: Path, load: Path, sparsity: SparsityConfig, **changes: Any) -> RunConfig:
    config = run_config(
        folder, text, model=RELU, checkpoint=checkpoint_config(load, save_interval=2), **changes
    )
    config.stage.sparsity = sparsity
    config.stage.micro_batch_size = 2  # fewer of gloo's slow collectives
    return config


def _points(folder: Path) -> list[dict[str, Any]]:
    return [point for point in read_metrics(folder) if "train/loss" in point]


@pytest.fixture(scope="module")
def one_rank(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path, hybrid_checkpoint: Path
) -> tuple[Path, list[tuple[float, float]]]:
    folder = tmp_path_factory.mktemp("one_rank")
    config = _config(folder, text, hybrid_checkpoint, SCHEDULE)
    (steps,) = ranks.run(train, config, world_size=1, parallel=ONE_RANK)
    return folder, steps


@pytest.mark.parametrize("name", [case(name, engine=each.engine) for name, (_, each) in TOPOLOGIES.items()])
def test_losses_and_metrics_equal_those_of_one_rank(
    name: str, ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path, one_rank: Any
) -> None:
    world_size, parallel = TOPOLOGIES[name]
    folder, expected = one_rank
    config = _config(tmp_path, text, hybrid_checkpoint, SCHEDULE, parallel=parallel)
    for steps in ranks.run(train, config, 4, world_size=world_size, parallel=parallel):
        assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in expected[:4]], rel=TOLERANCE)
    for point, alone in zip(_points(tmp_path), _points(folder)[:4], strict=True):
        assert point["train/l1_loss"] == pytest.approx(alone["train/l1_loss"], rel=TOLERANCE)
        assert point["ffn/l1_factor"] == alone["ffn/l1_factor"]
        names = [name for name in alone if name.startswith("ffn/sparsity")]
        assert len(names) == 1 + RELU.num_layers
        assert {each: point[each] for each in names} == pytest.approx(
            {each: alone[each] for each in names}, abs=OF_ZEROS
        )


def test_the_factor_rises_as_published_and_its_loss_is_reported_by_itself(one_rank: Any) -> None:
    points = _points(one_rank[0])
    assert [point["ffn/l1_factor"] for point in points] == pytest.approx([*FACTORS, 0.32, 0.32], rel=1e-12)
    for point in points:
        assert point["train/loss"] == pytest.approx(
            point["train/cross_entropy"] + point["train/l1_loss"], rel=1e-9
        )
        of_layers = [point[f"ffn/sparsity/layer_{layer}"] for layer in range(RELU.num_layers)]
        assert point["ffn/sparsity"] == pytest.approx(sum(of_layers) / len(of_layers), rel=1e-9)
    assert all(point["train/l1_loss"] > 0 for point in points)


def test_the_loss_makes_zeros(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path, one_rank: Any
) -> None:
    """One step in five is reported; without a schedule there is no such loss, and zeros are counted still."""
    config = _config(tmp_path, text, hybrid_checkpoint, SparsityConfig())
    config.logging.log_interval = 5
    ranks.run(train, config, world_size=1, parallel=ONE_RANK)
    without, with_l1 = _points(tmp_path), _points(one_rank[0])
    assert [point["iteration"] for point in without] == [5, 10]
    assert all("train/l1_loss" not in point and "ffn/l1_factor" not in point for point in without)
    assert with_l1[-1]["ffn/sparsity"] > without[-1]["ffn/sparsity"] + 0.01 > 0.3


def test_a_run_that_was_interrupted_ends_bit_for_bit_the_same(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path, one_rank: Any
) -> None:
    folder, expected = one_rank
    _interrupt_after(shutil.copytree(folder, tmp_path / "run"), 6)
    config = _config(tmp_path / "run", text, hybrid_checkpoint, SCHEDULE)
    (rest,) = ranks.run(train, config, world_size=1, parallel=ONE_RANK)
    assert rest == expected[6:]
