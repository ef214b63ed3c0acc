"""A stage that begins with small steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from spikingbrain_train.config.batch_size import BatchSizeLR, BatchSizeRampConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.planning.resume import read_stored_run
from spikingbrain_train.reporting.metrics import read_metrics
from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER, latest_checkpoint
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import checkpoint_config, run_config, train

SIZES = [2, 2, 2, 4, 4, 6, 6]
"""2 and 4 sequences a step for six sequences each, as far as whole steps go, then 6."""


def _config(
    folder: Path, text: Path, load: Path, parallel: ParallelConfig, lr: BatchSizeLR = BatchSizeLR.none
) -> RunConfig:
    config = run_config(folder, text, parallel=parallel, checkpoint=checkpoint_config(load, save_interval=4))
    ramp = BatchSizeRampConfig(start=2, increment=2, samples=12, lr=lr)
    config.stage = replace(config.stage, train_iters=len(SIZES), global_batch_size=6, batch_size_ramp=ramp)
    return config


@pytest.fixture(scope="module")
def one_rank(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path, hybrid_checkpoint: Path
) -> tuple[Path, list[tuple[float, float]]]:
    folder = tmp_path_factory.mktemp("run")
    config = _config(folder, text, hybrid_checkpoint, ParallelConfig(), BatchSizeLR.sqrt)
    (steps,) = ranks.run(train, config, world_size=1, parallel=ParallelConfig())
    return folder, steps


def test_steps_tokens_and_learning_rates_follow_the_ramp(
    one_rank: tuple[Path, list[tuple[float, float]]],
) -> None:
    folder, _ = one_rank
    points = read_metrics(folder)
    assert [point["train/global_batch_size"] for point in points] == SIZES
    assert [point["train/tokens"] for point in points] == [
        32 * sum(SIZES[: step + 1]) for step in range(len(SIZES))
    ]
    warm_up_and_cosine = [0.005, 0.01]
    expected = [rate * (2 / 6) ** 0.5 for rate in warm_up_and_cosine]
    assert [point["train/learning_rate"] for point in points[:2]] == pytest.approx(expected)
    stored = read_stored_run(latest_checkpoint(folder / CHECKPOINT_FOLDER, "output_dir"))
    assert stored.consumed_samples == sum(SIZES)


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, ParallelConfig(use_distributed_optimizer=True)),
        (2, ParallelConfig(pipeline_model_parallel_size=2)),
    ],
    ids=["DP 2, distributed optimizer", "PP 2"],
)
def test_a_stopped_run_goes_on_in_the_same_steps_as_one_rank(
    world_size: int,
    parallel: ParallelConfig,
    one_rank: tuple[Path, list[tuple[float, float]]],
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
) -> None:
    config = _config(tmp_path, text, hybrid_checkpoint, parallel, BatchSizeLR.sqrt)
    begun = ranks.run(train, config, 4, world_size=world_size, parallel=parallel)
    ended = ranks.run(train, config, world_size=world_size, parallel=parallel)

    steps = begun[0] + ended[0]
    assert [point["train/global_batch_size"] for point in read_metrics(tmp_path)] == SIZES
    # As test_training_topologies.py: rounding, which AdamW amplifies.
    for found, expected in zip(steps, one_rank[1], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
