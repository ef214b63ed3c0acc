"""Training with a linear transform that a plug-in brings, beside spikes: schedule, statistics, resume."""

from __future__ import annotations

import contextlib
import io
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from spikingbrain_train.config.linear_transforms import Projection, SpikingConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import DataConfig, LoggingConfig, RunConfig
from spikingbrain_train.config.sections import with_sections
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.metrics import read_metrics
from spikingbrain_train.storage.checkpoint_folder import LATEST_ITERATION_FILE, iteration_folder
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import MODEL, checkpoint_config, run_config, train, write_text
from tests.plugins.test_transforms_from_outside import with_rounding

pytestmark = pytest.mark.usefixtures("plugins")


def _run(output_dir: Path, text: Path, parallel: ParallelConfig) -> RunConfig:
    config = run_config(
        output_dir,
        text,
        model=with_rounding(replace(MODEL, spiking=SpikingConfig([Projection.qkv])), list(Projection), 1.0),
        parallel=parallel,
        logging=LoggingConfig(log_interval=1, eval_interval=2, eval_iters=1, tensorboard=False),
        checkpoint=checkpoint_config(save_interval=2),
    )
    config.data = DataConfig(train=[str(text)], valid=[str(text)])
    config.stage = replace(config.stage, train_iters=4)
    return with_sections(RunConfig)(**vars(config))


def _train_and_print(groups: ProcessGroups, config: RunConfig) -> tuple[list[tuple[float, float]], str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        return train(groups, config), printed.getvalue()


@pytest.mark.parametrize("degree", [1, 2])
def test_a_run_has_its_schedule_and_statistics_and_resumes_bit_for_bit(
    degree: int, ranks: RankPool, tmp_path: Path
) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=degree, sequence_parallel=degree > 1)
    (tmp_path / "text").mkdir()
    config = _run(tmp_path, write_text(tmp_path / "text"), parallel)
    trained = ranks.run(_train_and_print, config, world_size=degree, parallel=parallel)
    uninterrupted = [steps for steps, _ in trained]
    # Its own class says how the progress line shows it; nothing else knows its name.
    steps_shown = re.findall(r"\| step (\d\.\d\d) \|.* tokens/s", trained[0][1])
    assert steps_shown == ["0.10", "0.35", "0.60", "0.85"]
    assert (
        len(re.findall(r"held-out CE \d+\.\d+ .*\| step \d\.\d\d .*\| zero weights +\d+%", trained[0][1]))
        == 3
    )
    points = read_metrics(tmp_path)
    steps = [point["rounding/step"] for point in points if "train/loss" in point]
    assert steps == pytest.approx([0.1, 0.35, 0.6, 0.85])
    evaluations = [point for point in points if "valid/cross_entropy" in point]
    assert [point["rounding/step"] for point in evaluations] == pytest.approx([0.1, 0.6, 1.0])
    # Of normal weights, those below half a step are zero: P(|x| < step / 2 * sqrt(2 / pi)).
    zeros = [point["rounding/zeros"] for point in evaluations]
    expected = [math.erf(step / 2 / math.sqrt(math.pi)) for step in (0.1, 0.6, 1.0)]
    assert zeros == pytest.approx(expected, abs=0.03)
    assert all(point["spiking/k"] == 3.0 and "spiking/sparsity" in point for point in evaluations)

    checkpoints = tmp_path / "checkpoints"
    shutil.rmtree(iteration_folder(checkpoints, 4))
    (checkpoints / LATEST_ITERATION_FILE).write_text("2\n")
    resumed = ranks.run(train, config, world_size=degree, parallel=parallel)
    assert resumed == [steps[2:] for steps in uninterrupted]
