"""The norm of all weights is that of one rank, however they lie; peaks are found, and waits counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.known_peaks import known_peak_tflops
from spikingbrain_train.training.data_waits import DataWaits
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import MODEL_76B, checkpoint_config, run_config


def _norms(groups: ProcessGroups, config: RunConfig) -> tuple[float, float]:
    """As it is reported, and of what this rank has."""
    from spikingbrain_train.training.parameter_norm import parameter_norm
    from spikingbrain_train.training.trainer import Trainer

    model = Trainer(config, groups).state.model
    own = sum(float(each.detach().double().square().sum()) for each in model.parameters()) ** 0.5
    return float(parameter_norm(model, groups)), own


def test_the_norm_of_all_weights_is_the_same_in_every_topology(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_76b_checkpoint: Path
) -> None:
    config = run_config(tmp_path, text, model=MODEL_76B, checkpoint=checkpoint_config(hybrid_76b_checkpoint))
    ((norm, own),) = ranks.run(_norms, config, world_size=1, parallel=ParallelConfig())
    assert norm == pytest.approx(own, rel=1e-6)
    for topology in (
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        ParallelConfig(pipeline_model_parallel_size=2),
        ParallelConfig(expert_model_parallel_size=2),
    ):
        found = ranks.run(_norms, replace(config, parallel=topology), world_size=2, parallel=topology)
        assert [each for each, _ in found] == pytest.approx([own, own], rel=1e-6), topology


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD EPYC", None),
        ("NVIDIA T1000", None),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name: str, tflops: float | None) -> None:
    assert known_peak_tflops(name) == tflops


def test_only_the_time_in_front_of_batches_counts() -> None:
    now = [0.0]

    def batches():
        for seconds in (2.0, 3.0):
            now[0] += seconds
            yield seconds
        now[0] += 1.0

    waits = DataWaits(lambda: now[0])
    for _ in waits.over(batches()):
        now[0] += 50.0
    assert waits.take() == 6.0 and waits.take() == 0.0
