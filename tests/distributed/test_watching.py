"""The end of a run's time, alerts, and the first step in the log: what is there when nobody watches."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from spikingbrain_train.config.parallel import ClusterConfig, ParallelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import ConfigurationError, NumericalError
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.metrics import read_metrics
from spikingbrain_train.reporting.start_times import StartTimes
from spikingbrain_train.storage.checkpoint_folder import latest_iteration
from spikingbrain_train.training.alert import Alert
from spikingbrain_train.training.callbacks.alert_command import AlertCommand
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.callbacks.milestones import Milestones
from spikingbrain_train.training.callbacks.wall_time import SLURM_END, WallTimeLimit
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import run_config

WRITE_DOWN = """
import os, sys
with open(os.path.join(os.environ["ALERT_OUTPUT_DIR"], "alerts.txt"), "a") as file:
    file.write(" | ".join([os.environ["ALERT_LEVEL"], *sys.argv[1:]]) + "\\n")
"""


class OneClockIsFast(Callback):
    """The time of rank 1 is up in its third step; the wall clock jumps by a day before that."""

    def step_begin(self) -> None:
        if self.run.state.iteration == 1:
            time.time = lambda real=time.time: real() + 86400  # type: ignore[assignment]
        if self.run.state.iteration == 2 and self.run.groups.rank == 1:
            (limit,) = (each for each in self.run.callbacks if isinstance(each, WallTimeLimit))  # type: ignore[attr-defined]
            limit._deadline = time.monotonic() - 1


def _printed(groups: ProcessGroups, config: RunConfig, fast: bool) -> tuple[bool, list[str]]:
    from spikingbrain_train.training.trainer import Trainer

    wall_clock = time.time
    times = StartTimes(time.monotonic() - 5)
    times.add("imports and checks", 5.0)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            callbacks = [OneClockIsFast()] if fast else []
            done = Trainer(config, groups, callbacks, details=["heading"], start_times=times).train()
    finally:
        time.time = wall_clock
    return done, printed.getvalue().splitlines()


def test_a_run_whose_time_is_up_on_one_rank_stops_on_all_and_tells_who_does_not_watch(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    config = run_config(tmp_path / "run", text)
    config.cluster = ClusterConfig(peak_tflops=0.1, exit_duration_in_mins=600)
    config.stage = replace(config.stage, train_iters=5)
    script = tmp_path / "write_down.py"
    script.write_text(WRITE_DOWN)
    config.logging.alert_command = f"{sys.executable} {script}"

    (done, lines), (other_done, others) = ranks.run(
        _printed, config, True, world_size=2, parallel=ParallelConfig()
    )
    assert not done and not other_done and others == []
    assert latest_iteration(tmp_path / "run" / "checkpoints") == 3
    assert any(" ".join(line.split()) == "wall time saves and ends with code 75 in 10h 00m" for line in lines)
    why = "cluster.exit_duration_in_mins=600 is over"
    assert f"{why}: stopped at iteration 3; start again to go on" in lines
    (at,) = (number for number, line in enumerate(lines) if line.startswith("first step"))
    assert " after the start: 5.0 s imports and checks, " in lines[at]
    details = (tmp_path / "run" / "run_details.txt").read_text()
    (first_step,) = (line for line in details.splitlines() if line.startswith("first step"))
    assert "5.0 s imports and checks" in first_step and " s the first step" in first_step
    points = read_metrics(tmp_path / "run")
    assert points[0]["start/seconds"] > 5 and "start/seconds" not in points[1]

    ((done, _),) = ranks.run(_printed, config, False, world_size=1, parallel=ParallelConfig())
    assert done
    folder = tmp_path / "run"
    assert sorted((folder / "alerts.txt").read_text().splitlines()) == [
        f"info | run finished | {folder}, after iteration 5",
        f"info | run resumed | {folder} goes on at iteration 3",
        f"warning | run stopped | {folder}, after iteration 3: {why}; start it again to go on",
    ]


def limit(cluster: ClusterConfig, said: list[Any]) -> WallTimeLimit:
    callback = WallTimeLimit()
    console = SimpleNamespace(start_times=StartTimes(time.monotonic()), rows=said.extend)
    callback.run = SimpleNamespace(config=RunConfig(cluster=cluster), console=console, stop=said.append)  # type: ignore[assignment]
    callback.start()
    return callback


def test_a_slurm_job_ends_before_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setenv(SLURM_END, str(int(time.time()) + 3600))
    assert limit(ClusterConfig(), said).vote(Mock()) == 0
    assert said == [("wall time", "saves and ends with code 75 in 55m 00s")] or "54m 59s" in said[0][1]
    late = limit(ClusterConfig(exit_before_job_end_in_mins=61), said)
    assert late.vote(Mock()) == 1
    late.agreed(1)
    assert said[-1] == "the Slurm job is about to end"
    assert limit(ClusterConfig(exit_before_job_end_in_mins=None), []).vote(Mock()) == 0
    monkeypatch.setenv(SLURM_END, "tomorrow")
    with pytest.raises(ConfigurationError, match="SLURM_JOB_END_TIME=tomorrow is no number"):
        limit(ClusterConfig(), [])
    # A clock that has jumped ahead, of the node or of Slurm: every start would stop at once and be requeued.
    monkeypatch.setenv(SLURM_END, str(int(time.time()) - 3600))
    with pytest.raises(ConfigurationError, match="this Slurm job ended 1h .*; set the clock of that node"):
        limit(ClusterConfig(), [])
    assert limit(ClusterConfig(exit_before_job_end_in_mins=None), []).vote(Mock()) == 0
    monkeypatch.delenv(SLURM_END)
    unlimited: list[Any] = []
    assert limit(ClusterConfig(), unlimited).vote(Mock()) == 0 and unlimited == []


@pytest.mark.parametrize(
    ("command", "how"), [("/bin/false", "ended with code 1"), ("/no/such/command", "cannot be started")]
)
def test_a_command_that_fails_is_said_once_and_stops_nothing(command: str, how: str) -> None:
    said: list[str] = []
    config = RunConfig(output_dir="out")
    config.logging.alert_command = command
    callback = AlertCommand()
    callback.run = SimpleNamespace(config=config, say=said.append)  # type: ignore[assignment]
    for _ in range(2):
        callback.alert(Alert("slow rank", "rank 2"))
    callback.end(None)
    (line,) = said
    assert f"logging.alert_command={command} {how}" in line


@pytest.mark.parametrize(
    ("error", "title"), [(NumericalError("the loss is nan"), "run diverged"), (OSError("full"), "run failed")]
)
def test_a_run_that_fails_says_why(error: Exception, title: str) -> None:
    listening = Mock()
    callback = Milestones()
    callback.run = SimpleNamespace(  # type: ignore[assignment]
        config=RunConfig(output_dir="out"), state=SimpleNamespace(iteration=7), callbacks=listening
    )
    callback.end(error)
    (alert,) = listening.alert.call_args.args
    assert alert.title == title and str(error) in alert.text and "after iteration 7" in alert.text
