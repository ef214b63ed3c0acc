"""Training with spikes: annealed, resumed, reported, and split over ranks.

A count that lies on a rounding boundary can go either way when a matrix product is split differently (see
tests/models/linears/test_spikes.py), and every step of training moves thousands of counts. So topologies are
held together where that cannot happen by chance: at the first step, from the same weights, to 1e-5 in the
loss. A resume on the same topology repeats every bit.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.config.linear_transforms import Projection, SpikingConfig
from spikingbrain_train.config.parallel import EngineKind, ParallelConfig
from spikingbrain_train.config.run import DataConfig, LoggingConfig, RunConfig
from spikingbrain_train.config.stage import SpikeAnnealingConfig
from spikingbrain_train.reporting.metrics import read_metrics
from spikingbrain_train.storage.checkpoint_folder import LATEST_ITERATION_FILE, iteration_folder
from tests.distributed.pool import RankPool
from tests.distributed.sharding_engines import case, fsdp
from tests.distributed.small_runs import (
    MODEL,
    TOPOLOGIES,
    checkpoint_config,
    run_config,
    train,
    train_and_not_save,
)

STATISTICS = ("spiking/sparsity", "spiking/share_up_to_7", "spiking/mean_spikes")
SPIKING = replace(MODEL, spiking=SpikingConfig(projections=list(Projection), k=3.0))


def _config(output_dir: Path, text: Path, checkpoint: Path, parallel: ParallelConfig) -> RunConfig:
    config = run_config(
        output_dir,
        text,
        model=SPIKING,
        parallel=parallel,
        logging=LoggingConfig(log_interval=1, eval_interval=3, eval_iters=1, tensorboard=False),
        checkpoint=checkpoint_config(checkpoint, save_interval=6),
    )
    config.data = DataConfig(train=[str(text)], valid=[str(text)])
    config.stage.spike_annealing = SpikeAnnealingConfig(init_k=48.0, anneal_iters=8)
    config.stage.micro_batch_size = 2  # fewer of gloo's slow collectives
    return config


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(), ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)],
    ids=["one rank", "TP 2 + sequence parallel"],
)
def test_a_resumed_annealing_repeats_the_uninterrupted_one_bit_for_bit(
    parallel: ParallelConfig, ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path
) -> None:
    config = _config(tmp_path, text, hybrid_checkpoint, parallel)
    world_size = parallel.tensor_model_parallel_size
    uninterrupted = ranks.run(train, config, world_size=world_size, parallel=parallel)
    points = read_metrics(tmp_path)
    checkpoints = tmp_path / "checkpoints"
    shutil.rmtree(iteration_folder(checkpoints, 10))
    (checkpoints / LATEST_ITERATION_FILE).write_text("6\n")

    resumed = ranks.run(train_and_not_save, config, world_size=world_size, parallel=parallel)

    assert resumed == [steps[6:] for steps in uninterrupted]
    names = ("train/loss", "spiking/k", "spiking/sparsity", "spiking/share_up_to_7", "valid/cross_entropy")
    assert [{name: point.get(name) for name in names} for point in read_metrics(tmp_path)] == [
        {name: point.get(name) for name in names} for point in points
    ]


def test_k_and_the_spikes_are_reported(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path
) -> None:
    config = _config(tmp_path, text, hybrid_checkpoint, ParallelConfig())
    ranks.run(train_and_not_save, config, world_size=1, parallel=ParallelConfig())
    points = read_metrics(tmp_path)
    steps = [point["spiking/k"] for point in points if "train/loss" in point]
    assert steps == pytest.approx([48 * 0.5 ** (step / 2) for step in range(8)] + [3.0, 3.0])
    evaluations = [point for point in points if "valid/cross_entropy" in point]
    assert [point["spiking/k"] for point in evaluations] == pytest.approx([48, 48 / 2**1.5, 6, 3, 3])
    # The steps in between count a few tokens.
    reported = [point for point in points if "train/loss" in point]
    for name in STATISTICS:
        of_steps = name.replace("spiking/", "spiking/train_")
        assert all(of_steps in point for point in reported)
        assert not any(of_steps in point for point in evaluations)
        assert reported[-1][of_steps] == pytest.approx(evaluations[-1][name], abs=0.15)
    # Fewer spikes as k falls: more channels within 7 counts, and fewer of their bits set.
    shares = [point["spiking/share_up_to_7"] for point in evaluations]
    assert shares == sorted(shares) and shares[0] < 0.3 and shares[-1] > 0.85
    assert evaluations[-1]["spiking/sparsity"] > evaluations[0]["spiking/sparsity"]
    assert evaluations[-1]["spiking/mean_spikes"] < evaluations[0]["spiking/mean_spikes"]
    for name in STATISTICS:
        of_layers = [evaluations[-1][f"{name}/layer_{layer}"] for layer in range(MODEL.num_layers)]
        assert len(set(of_layers)) > 1 and min(of_layers) <= evaluations[-1][name] <= max(of_layers)


FirstStep = tuple[tuple[float, float], dict[str, Any]]
"""Loss and gradient norm, and the evaluation before it."""


def _first_step(
    ranks: RankPool, folder: Path, text: Path, load: Path, parallel: ParallelConfig, world_size: int
) -> FirstStep:
    config = _config(folder, text, load, parallel)
    config.stage = replace(config.stage, train_iters=1, spike_annealing=SpikeAnnealingConfig())
    config.optimizer.lr_warmup_iters = 0
    (step,), *_ = ranks.run(train_and_not_save, config, world_size=world_size, parallel=parallel)
    return step, read_metrics(folder)[0]


@pytest.fixture(scope="module")
def of_one_rank(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path, hybrid_checkpoint: Path
) -> FirstStep:
    folder = tmp_path_factory.mktemp("one_rank")
    return _first_step(ranks, folder, text, hybrid_checkpoint, ParallelConfig(), 1)


WITH_FSDP = {
    "TP 2 + sequence parallel x DP 2, FSDP": (4, fsdp(tensor_model_parallel_size=2, sequence_parallel=True))
}


@pytest.mark.parametrize(
    "name",
    [
        *("TP 2", "TP 2 + sequence parallel", "PP 2", "DP 2", "TP 2 x PP 2"),
        case("TP 2 + sequence parallel x DP 2, FSDP", engine=EngineKind.fsdp),
    ],
)
def test_the_first_step_and_evaluation_equal_those_of_one_rank(
    name: str, ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path, of_one_rank: FirstStep
) -> None:
    world_size, parallel = {**TOPOLOGIES, **WITH_FSDP}[name]
    step, found = _first_step(ranks, tmp_path, text, hybrid_checkpoint, parallel, world_size)
    expected_step, expected = of_one_rank
    assert step[0] == pytest.approx(expected_step[0], rel=1e-5)
    assert step[1] == pytest.approx(expected_step[1], rel=1e-4)
    assert found["valid/cross_entropy"] == pytest.approx(expected["valid/cross_entropy"], rel=1e-5)
    for statistic in STATISTICS:
        assert found[statistic] == pytest.approx(expected[statistic], abs=1e-4)
        for layer in range(MODEL.num_layers):  # one count that moved weighs more among those of a layer
            name = f"{statistic}/layer_{layer}"
            assert found[name] == pytest.approx(expected[name], abs=4e-4)
