"""A rank that computes longer than its peers is named; equal ones are not, nor are stages that differ."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from spikingbrain_train.config.parallel import ClusterConfig, ParallelConfig
from spikingbrain_train.config.run import LoggingConfig, RunConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.metrics import read_metrics
from spikingbrain_train.runtime.collective_waits import marked_collectives
from spikingbrain_train.storage.checkpoint_folder import latest_iteration
from spikingbrain_train.training.alert import Alert
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.callbacks.slow_ranks import RankTime, SlowRanks, beside_peers
from spikingbrain_train.training.report import Report
from spikingbrain_train.training.step_times import PassTime, PassTimer
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import MODEL, run_config

COMPUTING = 0.05
"""Seconds of a forward pass beside what the small model takes."""


def _passes_of_one_length(groups: ProcessGroups, steps: int, slow: dict[int, range]) -> list[tuple[int, str]]:
    """Steps whose passes are sleep, so that they take what they should, and an all-reduce."""
    said: list[tuple[int, str]] = []
    run: Any = SimpleNamespace(
        config=RunConfig(logging=LoggingConfig(log_interval=10), stage=StageConfig(train_iters=steps)),
        groups=groups,
        state=SimpleNamespace(iteration=0),
        callbacks=Callback(),
        say=lambda text: said.append((run.state.iteration, text)),
    )
    callback, losses = SlowRanks(), Mock()
    callback.run = run
    callback.start()
    for step in range(steps):
        callback.step_begin()
        time.sleep(0.03 * (1.3 if step in slow.get(groups.rank, ()) else 1.0))
        torch.distributed.all_reduce(torch.ones(1))
        callback.vote(losses)
        run.state.iteration += 1
        if run.state.iteration % 10 == 0:
            callback.report_due(Report(run.state.iteration, {}))
    callback.end(None)
    return said


def test_a_rank_slowed_by_30_percent_is_named_within_50_steps_and_equal_ones_are_not(
    ranks: RankPool,
) -> None:
    """Rank 2 is slower in steps 40 to 79; before and after it is like the others."""
    said, *others = ranks.run(
        _passes_of_one_length, 120, {2: range(40, 80)}, world_size=4, parallel=ParallelConfig()
    )
    assert all(other == said for other in others), "ranks disagree"
    (named, text), (recovered, again) = said
    assert 40 < named <= 80 and named < recovered
    assert f"rank 2 on {platform.node()} computes" in text and "the median of its peers" in text
    assert again == "rank 2 computes as fast as its peers again"


class Listen(Callback):
    """Lets forward passes of this rank take their time, and remembers what is said."""

    def __init__(
        self, factors: dict[int, float], seconds: float = COMPUTING, until_named: bool = False
    ) -> None:
        self.factors, self.seconds, self.until_named = factors, seconds, until_named
        self.said: list[tuple[int, str]] = []
        self.alerts: list[Alert] = []

    def start(self) -> None:
        run: Any = self.run

        def say(text: str) -> None:
            self.said.append((run.state.iteration, text))
            if self.until_named and "warning" in text and "peers" in text:
                run.stop("enough has been said")

        run.say = say
        forward, seconds = run.model.module.forward, self.seconds * self.factors.get(run.groups.rank, 1.0)

        def takes_its_time(*arguments: Any, **options: Any) -> Any:
            time.sleep(seconds)
            return forward(*arguments, **options)

        run.model.module.forward = takes_its_time

    def alert(self, alert: Alert) -> None:
        if alert.title == "slow rank":
            self.alerts.append(alert)


def _listen(
    groups: ProcessGroups, config: RunConfig, factors: dict[int, float]
) -> tuple[list[tuple[int, str]], list[Alert]]:
    from spikingbrain_train.training.trainer import Trainer

    listen = Listen(factors)
    Trainer(config, groups, [listen]).train()
    return [(step, text) for step, text in listen.said if "peers" in text], listen.alerts


def _run(ranks: RankPool, config: RunConfig, factors: dict[int, float], **parallel: int) -> list[Any]:
    config.parallel = ParallelConfig(**parallel)
    return ranks.run(_listen, config, factors, world_size=4, parallel=config.parallel)


@pytest.fixture
def config(text: Path, tmp_path: Path) -> RunConfig:
    config = run_config(tmp_path / "run", text, model=replace(MODEL, num_layers=2, mixers=["swa"]))
    config.stage = StageConfig(train_iters=10, seq_length=8, global_batch_size=4, micro_batch_size=1)
    config.logging = LoggingConfig(log_interval=2, tensorboard=False)
    return config


def test_training_names_the_slow_one_of_four_data_parallel_ranks(ranks: RankPool, config: RunConfig) -> None:
    (said, alerts), *others = _run(ranks, config, {2: 6.0})
    assert all(named == said for named, _ in others), "ranks disagree"
    ((_, text),) = said
    assert "rank 2 on " in text
    assert [alert.title for alert in alerts] == ["slow rank"] and "rank 2" in alerts[0].text
    assert not any(alerts for _, alerts in others)
    point = read_metrics(config.output_dir)[-1]
    assert point["train/slowest_rank"] == 2
    assert point["train/compute_seconds_slowest"] > 1.2 * point["train/compute_seconds"] > COMPUTING
    # The others wait for it: all steps take as long as its own.
    assert point["train/communication_seconds"] > COMPUTING


def test_pipeline_stages_that_differ_are_no_slow_ranks_and_a_slow_one_among_its_peers_is(
    ranks: RankPool, config: RunConfig
) -> None:
    """Ranks 0 and 1 are the first stage, 2 and 3 the second, which computes longer than the slow one."""
    config.stage.global_batch_size = 2
    (said, _), *_ = _run(ranks, config, {1: 6.0, 2: 9.0, 3: 9.0}, pipeline_model_parallel_size=2)
    assert ["rank 1 on" in text for _, text in said] == [True]


def test_a_rank_is_compared_with_the_others_of_its_stage_alone() -> None:
    times = [
        RankTime(rank, (rank // 3, 0), seconds, 0.0)
        for rank, seconds in enumerate([1.0, 1.0, 1.3, 4.0, 5.0, 4.0, 9.0])
    ]
    factors = [round(each.factor, 2) for each in beside_peers(times)]
    assert factors == [0.87, 0.87, 1.3, 0.89, 1.25, 0.89, 1.0]  # the last has no peers


def _sums_within_and_behind_marks(groups: ProcessGroups) -> tuple[list[float], int]:
    """An all-reduce within the marks that GPUs need, and one behind them."""
    marked, sums = [], []
    for within in (True, False):
        marks = marked_collectives(lambda: lambda: marked.append(1), on_stream=True)
        with marks if within else nullcontext():
            number = torch.ones(1)
            torch.distributed.all_reduce(number)
            sums.append(number.item())
    return sums, len(marked)


def test_collectives_are_what_they_were_behind_steps_that_a_gpu_has_timed(ranks: RankPool) -> None:
    for sums, marked in ranks.run(_sums_within_and_behind_marks, world_size=2, parallel=ParallelConfig()):
        assert sums == [2.0, 2.0]
        assert marked  # in the first alone: there is none to count behind it


def test_without_a_factor_nothing_is_timed(ranks: RankPool, config: RunConfig) -> None:
    config.cluster = ClusterConfig(peak_tflops=0.1, slow_rank_factor=None)
    assert ranks.run(_listen, config, {}, world_size=1, parallel=ParallelConfig()) == [([], [])]
    reported = read_metrics(config.output_dir)[-1]
    assert not [name for name in reported if "slowest" in name or "compute" in name or "communic" in name]


def _compute(
    groups: ProcessGroups, config: RunConfig, slow_rank: int | None, cores: set[int] | None = None
) -> tuple[list[tuple[int, str]], list[Alert]]:
    """Train until a rank is named; one computes 30 % more in each pass, by products of matrices."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or before)
    try:
        return _compute_there(groups, config, slow_rank)
    finally:
        os.sched_setaffinity(0, before)


def _compute_there(
    groups: ProcessGroups, config: RunConfig, slow_rank: int | None
) -> tuple[list[tuple[int, str]], list[Alert]]:
    from spikingbrain_train.training.trainer import Trainer

    listen = Listen({}, seconds=0.0, until_named=True)
    trainer = Trainer(config, groups, [listen])
    whole, matrix = trainer.stage.forward_backward, torch.randn(64, 64)

    def forward_backward(*arguments: Any) -> Any:
        began = time.thread_time()
        losses = whole(*arguments)
        until = time.thread_time() + 0.3 * (time.thread_time() - began)
        while groups.rank == slow_rank and time.thread_time() < until:
            matrix @ matrix
        return losses

    trainer.stage.forward_backward = forward_backward  # type: ignore[method-assign]
    trainer.train()
    return [(step, text) for step, text in listen.said if "peers" in text], listen.alerts


def test_of_more_ranks_than_cores_the_one_that_computes_30_percent_more_is_named_and_no_other(
    ranks: RankPool, config: RunConfig
) -> None:
    config.model = replace(config.model, hidden_size=64, ffn_hidden_size=128)
    config.logging.log_interval = 5
    for slow_rank, steps in ((None, 30), (2, 50)):
        # Shorter steps let what else the cores do look like a fifth of a rank's own work.
        config.stage = replace(config.stage, train_iters=steps, seq_length=256)
        found = ranks.run(_compute, config, slow_rank, world_size=4, parallel=ParallelConfig())
        said, _ = found[0]
        named = [text for _, text in said if text.startswith("warning")]
        assert ["rank 2 on " in text for text in named] == ([] if slow_rank is None else [True]), said
        config.output_dir += "_slow"


def _is_stopped_again_and_again(groups: ProcessGroups, config: RunConfig, rank: int) -> list[str]:
    """Train, while one rank stands still for 40 of every 100 milliseconds, as a host that throttles it."""
    throttle = (
        "import os, signal, time\n"
        f"while os.getppid() == {os.getpid()}:\n"
        f"  os.kill({os.getpid()}, signal.SIGSTOP); time.sleep(0.04)\n"
        f"  os.kill({os.getpid()}, signal.SIGCONT); time.sleep(0.06)\n"
    )
    stopping = subprocess.Popen([sys.executable, "-c", throttle]) if groups.rank == rank else None
    try:
        said, _ = _compute(groups, config, None)
    finally:
        if stopping is not None:
            stopping.kill()
            stopping.wait()
    return [text for _, text in said if text.startswith("warning")]


def test_a_rank_that_is_stopped_again_and_again_is_named_and_training_goes_on(
    ranks: RankPool, config: RunConfig
) -> None:
    config.model = replace(config.model, hidden_size=64, ffn_hidden_size=128)
    config.stage = replace(config.stage, train_iters=50, seq_length=64)
    config.logging.log_interval = 5
    said = ranks.run(_is_stopped_again_and_again, config, 1, world_size=2, parallel=ParallelConfig())
    assert said[0] == said[1] and ["rank 1 on " in text for text in said[0]] == [True]
    saved = latest_iteration(Path(config.output_dir) / "checkpoints")
    assert saved is not None and saved % 5 == 0, "stopped and saved behind the report that names it"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_of_two_ranks_on_two_busy_cores_the_one_that_computes_30_percent_more_is_named_and_no_other(
    ranks: RankPool, config: RunConfig
) -> None:
    cores = set(sorted(os.sched_getaffinity(0))[:2])
    config.model = replace(config.model, hidden_size=64, ffn_hidden_size=128)
    config.stage = replace(config.stage, train_iters=50, seq_length=64)
    config.logging.log_interval = 5
    spin = f"import os; os.sched_setaffinity(0, {cores})\nwhile os.getppid() == {os.getpid()}: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as other:
        try:
            found = ranks.run(_compute, config, 1, cores, world_size=2, parallel=ParallelConfig())
        finally:
            other.kill()
    named = [text for _, text in found[0][0] if text.startswith("warning")]
    assert ["rank 1 on " in text for text in named] == [True], found[0]


def _beside_others(seconds: float, shares_cores: bool) -> tuple[float, float]:
    """Compute for so long on a core that two others want, too. Returns what is measured, and CPU time."""
    timer = PassTimer(torch.device("cpu"), shares_cores=shares_cores)
    timer.begin()
    began = time.thread_time()
    while time.thread_time() < began + seconds:
        pass
    used = time.thread_time() - began
    timer.end()
    return timer.take()[0].computing, used


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="the system counts no queueing")
def test_queueing_for_a_core_that_ranks_share_is_not_computing() -> None:
    core = min(os.sched_getaffinity(0))
    spin = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile os.getppid() == {os.getpid()}: pass"
    others = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(2)]
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {core})
        computing, used = _beside_others(0.2, shares_cores=True)
        with_queue, _ = _beside_others(0.2, shares_cores=False)
    finally:
        os.sched_setaffinity(0, before)
        for other in others:
            other.kill()
            other.wait()
    assert used <= computing < 1.15 * used
    assert with_queue > 1.5 * used


class _Event:
    """In place of a CUDA event: the order in which events are recorded is their time."""

    recorded = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        _Event.recorded += 1
        self.at = _Event.recorded

    def elapsed_time(self, later: _Event) -> float:
        return 1000.0 * (later.at - self.at)


def test_on_gpus_events_on_the_stream_are_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """begin, three pairs around waits, and end: seven steps of the clock, three of them waiting."""
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.distributed.Work, "wait", lambda work: None)
    monkeypatch.setattr(torch.distributed.ProcessGroup, "allreduce", lambda group: None)
    timer = PassTimer(torch.device("cuda", 0))
    for _ in range(2):
        timer.begin()
        torch.distributed.Work.wait(Mock())
        torch.distributed.ProcessGroup.allreduce(Mock())
        torch.distributed.Work.wait(Mock())
        timer.end()
        torch.distributed.Work.wait(Mock())  # between passes
    assert timer.take() == [PassTime(computing=4.0, waiting=3.0)] * 2
    assert timer.take() == []
