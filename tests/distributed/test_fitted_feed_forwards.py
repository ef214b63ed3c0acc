"""An align stage fits projections of a model whose feed-forwards alone are not its teacher's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from spikingbrain_train.config.model import ActivationFunc
from spikingbrain_train.config.parallel import EngineKind, ParallelConfig
from spikingbrain_train.config.stage import AlignmentConfig, AlignmentInputs
from spikingbrain_train.reporting.metrics import read_metrics
from tests.distributed.pool import RankPool
from tests.distributed.sharding_engines import case, fsdp
from tests.distributed.small_runs import DENSE, TOPOLOGIES, checkpoint_config, run_config, train_and_not_save

TOLERANCE = 1e-5
"""Relative, of drifts behind four layers in fp32: sums over tokens and features are split over ranks."""
ONE_RANK = ParallelConfig()
RELU = replace(DENSE, activation_func=ActivationFunc.relu)


def drifts(
    ranks: RankPool,
    folder: Path,
    text: Path,
    dense: Path,
    world_size: int = 1,
    parallel: ParallelConfig = ONE_RANK,
    ridge: float = 0.1,
) -> list[float]:
    """|student - teacher|^2 / |teacher|^2 of the hidden states behind each layer, after the fit."""
    config = run_config(folder, text, model=RELU, parallel=parallel, checkpoint=checkpoint_config(dense))
    config.stage.kind, config.stage.teacher, config.stage.train_iters = "align", str(dense), 0
    config.stage.micro_batch_size = 2
    config.stage.alignment = AlignmentConfig(
        calibration_tokens=4 * 4 * 32,
        calibration_inputs=AlignmentInputs.student,
        fit_source_projections=True,
        source_projection_ridge=ridge,
    )
    ranks.run(train_and_not_save, config, world_size=world_size, parallel=parallel)
    (start, *_) = read_metrics(folder)
    return [start[f"align/start/drift/layer_{layer}"] for layer in range(RELU.num_layers)]


@pytest.fixture(scope="module")
def on_one_rank(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path, dense_checkpoint: Path
) -> list[float]:
    return drifts(ranks, tmp_path_factory.mktemp("one"), text, dense_checkpoint)


def test_a_fit_brings_hidden_states_back_to_the_sources(
    ranks: RankPool, tmp_path: Path, text: Path, dense_checkpoint: Path, on_one_rank: list[float]
) -> None:
    unchanged = drifts(ranks, tmp_path, text, dense_checkpoint, ridge=1e9)
    assert all(0 < fitted < 0.5 * before for fitted, before in zip(on_one_rank, unchanged, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        *("TP 2 + sequence parallel x CP 2", "PP 2 x CP 2", "DP 2, distributed optimizer"),
        case("TP 2 x DP 2, FSDP", engine=EngineKind.fsdp),
    ],
)
def test_the_fit_is_the_same_on_every_topology(
    ranks: RankPool, tmp_path: Path, text: Path, dense_checkpoint: Path, on_one_rank: list[float], name: str
) -> None:
    layouts = {**TOPOLOGIES, "TP 2 x DP 2, FSDP": (4, fsdp(tensor_model_parallel_size=2))}
    found = drifts(ranks, tmp_path, text, dense_checkpoint, *layouts[name])
    assert found == pytest.approx(on_one_rank, rel=TOLERANCE)
