"""A run that is asked to stop finishes its step, saves, and goes on later as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from spikingbrain_train.config.command_line import START_AGAIN
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.metrics import METRICS_FILE, read_metrics
from spikingbrain_train.storage.checkpoint_folder import latest_iteration
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.callbacks.stop_signals import STOPPING, StopSignals
from tests.distributed.forked_launch import Fork, start_alone
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import Remember, checkpoint_config, run_config, train

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class _Run:
    """What signals stop."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.callbacks = Callback()
        self.groups = Mock(rank=0)

    def stop(self, reason: str) -> None:
        self.reasons.append(reason)


@pytest.fixture
def run() -> _Run:
    return _Run()


def stop_signals(run: _Run) -> StopSignals:
    signals = StopSignals()
    signals.run = run  # type: ignore[assignment]
    return signals


def one_step(signals: StopSignals, during: Callable[[], object] = lambda: None) -> None:
    """On one rank, whose vote is what is agreed."""
    signals.step_begin()
    during()
    signals.agreed(signals.vote(Mock()))


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_held_back_until_the_run_asks(number: signal.Signals, run: _Run, handlers: None) -> None:
    signals = stop_signals(run)
    one_step(signals)
    assert run.reasons == []
    one_step(signals, lambda: os.kill(os.getpid(), number))
    assert run.reasons == [number.name]
    signals.end(None)
    # Nothing that the launcher sends now may change how the process ends.
    assert signal.getsignal(number) is signal.SIG_IGN


def test_callbacks_are_told_of_a_signal(run: _Run, handlers: None) -> None:
    told: list[signal.Signals] = []
    run.callbacks.signal = told.append  # type: ignore[method-assign]
    one_step(stop_signals(run), lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert told == [signal.SIGTERM]


def test_the_second_interrupt_ends_at_once(run: _Run, handlers: None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it
    signals = stop_signals(run)
    signals.step_begin()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
    signals.end(interrupt.value)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_a_signal_everything_is_as_before(run: _Run, handlers: None) -> None:
    before = {number: signal.getsignal(number) for number in STOPPING}
    signals = stop_signals(run)
    one_step(signals)
    signals.end(None)
    assert run.reasons == []
    assert {number: signal.getsignal(number) for number in STOPPING} == before


def test_a_warning_that_comes_before_the_first_step_is_not_missed(run: _Run, handlers: None) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as launch.sh starts a run
    signals = stop_signals(run)
    os.kill(os.getpid(), signal.SIGUSR1)
    one_step(signals)
    assert run.reasons == ["SIGUSR1"]


def test_ranks_whose_launcher_was_killed_save_and_end(
    run: _Run, handlers: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for is_launched in (False, True):  # a shell that starts a run may end before it
        if is_launched:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        with monkeypatch.context() as patched:
            signals = stop_signals(run)
            one_step(signals)
            patched.setattr(os, "getppid", lambda: 1)
            one_step(signals)
            one_step(signals)
            signals.end(None)
        assert run.reasons == (["SIGTERM"] * 2 if is_launched else [])
    assert capsys.readouterr().err.count("torchrun has ended without its ranks") == 1


def test_outside_the_main_thread_nothing_is_held_back(run: _Run, handlers: None) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as launch.sh starts a run

    def in_thread() -> None:
        signals = stop_signals(run)
        one_step(signals)
        signals.end(None)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(in_thread).result()
    assert run.reasons == []


def _order_of_a_step(groups: ProcessGroups, config: RunConfig) -> list[str]:
    from spikingbrain_train.training.trainer import Trainer

    trainer, order = Trainer(config, groups), []

    def noted(name: str, original: Callable[..., Any], *arguments: Any) -> Any:
        order.append(name)
        return original(*arguments)

    for owner, name in ((trainer.callbacks, "agree"), (trainer.state.optimizer, "step_with_ready_grads")):
        setattr(owner, name, partial(noted, name, getattr(owner, name)))
    trainer.train()
    return order


def test_whether_to_stop_is_settled_before_the_update_so_that_no_host_waits_for_it(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    config = run_config(tmp_path / "run", text)
    config.stage.train_iters = 3
    (order,) = ranks.run(_order_of_a_step, config, world_size=1, parallel=ParallelConfig())
    assert order == ["agree", "step_with_ready_grads"] * 3


def _train_and_interrupt(
    groups: ProcessGroups, config: RunConfig, rank: int, iteration: int, number: signal.Signals
) -> tuple[bool, int, list[float]]:
    """Train, with ``number`` sent to one rank in mid-step. Returns (finished, iteration, losses)."""
    from spikingbrain_train.training.trainer import Trainer

    before = {other: signal.getsignal(other) for other in STOPPING}

    class Interrupt(Remember):
        def step_begin(self) -> None:
            if groups.rank == rank and self.run.state.iteration == iteration - 1:
                os.kill(os.getpid(), number)

    interrupt = Interrupt()
    trainer = Trainer(config, groups, [interrupt])
    try:
        finished = trainer.train()
        return finished, trainer.state.iteration, [loss for loss, _ in interrupt.steps]
    finally:
        for other, handler in before.items():
            signal.signal(other, handler)


@pytest.mark.parametrize(
    ("parallel", "rank", "number"),
    [
        (ParallelConfig(tensor_model_parallel_size=2), 1, signal.SIGUSR1),
        (ParallelConfig(use_distributed_optimizer=True), 0, signal.SIGTERM),
    ],
    ids=["TP 2, one rank warned", "DP 2, distributed optimizer, one rank terminated"],
)
def test_all_ranks_stop_after_the_same_step_and_the_resumed_losses_are_bit_identical(
    parallel: ParallelConfig,
    rank: int,
    number: signal.Signals,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
) -> None:
    whole, parts = (
        run_config(tmp_path / name, text, parallel=parallel, checkpoint=checkpoint_config(hybrid_checkpoint))
        for name in ("whole", "parts")
    )
    for config in (whole, parts):
        config.stage.train_iters, config.stage.micro_batch_size = 5, 2
    uninterrupted = ranks.run(train, whole, world_size=2, parallel=parallel)

    stopped = ranks.run(_train_and_interrupt, parts, rank, 3, number, world_size=2, parallel=parallel)
    assert [(finished, iteration) for finished, iteration, _ in stopped] == [(False, 3)] * 2
    assert latest_iteration(tmp_path / "parts" / "checkpoints") == 3

    resumed = ranks.run(train, parts, world_size=2, parallel=parallel)
    assert resumed == [steps[3:] for steps in uninterrupted]
    points, expected = read_metrics(tmp_path / "parts"), read_metrics(tmp_path / "whole")
    assert [point.get("train/loss") for point in points] == [point.get("train/loss") for point in expected]


def _settings(folder: Path, text: Path) -> list[str]:
    return [
        *("model=tiny_hybrid", "model.vocab_size=130", "cluster=cpu", "precision=fp32", "parallel=single"),
        *(f"data.train=[{text}]", "stage.seq_length=64", "stage.global_batch_size=2"),
        *(f"output_dir={folder / 'run'}", "stage.train_iters=100000", "logging.log_interval=1"),
        *("logging.tensorboard=false", "cluster.peak_tflops=1"),
    ]


def _start_torchrun(folder: Path, text: Path) -> subprocess.Popen[str]:
    arguments = _settings(folder, text)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    return subprocess.Popen(
        [sys.executable, *launcher, str(REPOSITORY / "train.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _wait_for_steps(process: subprocess.Popen[str] | Fork, folder: Path, log: Path | None = None) -> None:
    metrics, deadline = folder / "run" / METRICS_FILE, time.monotonic() + 200
    while not metrics.exists() or metrics.read_text().count("train/loss") < 3:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[0] if log is None else log.read_text())
        time.sleep(0.1)


def _end(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=120)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("number", STOPPING)
def test_a_process_that_is_asked_to_stop_saves_and_says_start_again(
    number: signal.Signals, tmp_path: Path, text: Path
) -> None:
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    process = start_alone([str(REPOSITORY / "train.py"), *_settings(tmp_path, text)], variables, log)
    try:
        _wait_for_steps(process, tmp_path, log)
        os.kill(process.pid, number)
        process.wait(120)
    finally:
        process.kill()
    output = log.read_text()
    assert process.returncode == START_AGAIN, output
    assert f"{number.name}: stopped at iteration" in output and "Traceback" not in output
    last = json.loads((tmp_path / "run" / METRICS_FILE).read_text().splitlines()[-1])
    assert latest_iteration(tmp_path / "run" / "checkpoints") == last["iteration"]


@pytest.mark.slow
def test_torchrun_hands_its_signal_on_and_every_rank_ends_with_the_code(tmp_path: Path, text: Path) -> None:
    process = _start_torchrun(tmp_path, text)
    _wait_for_steps(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    output = _end(process)
    assert "SIGTERM: stopped at iteration" in output, output
    assert process.returncode != 0
    last = json.loads((tmp_path / "run" / METRICS_FILE).read_text().splitlines()[-1])
    assert latest_iteration(tmp_path / "run" / "checkpoints") == last["iteration"]


# One node of Slurm; the signal reaches the first process of a step only.
SRUN = """#!/usr/bin/env bash
while [ "$1" != bash ]; do shift; done
trap 'kill -USR1 "$task"' USR1
SLURM_NODEID=0 "$@" & task=$!
while wait "$task"; code=$?; kill -0 "$task" 2> /dev/null; do :; done
exit "$code"
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="the launchers are bash scripts")
def test_slurms_warning_reaches_the_ranks_and_the_job_is_requeued_when_they_have_saved(
    tmp_path: Path, text: Path
) -> None:
    programs, log = tmp_path / "bin", tmp_path / "scontrol.log"
    programs.mkdir()
    scontrol = f'#!/usr/bin/env bash\n(echo "$@"; ls {tmp_path}/run/checkpoints) >> {log}\n'
    for name, script in (("srun", SRUN), ("scontrol", scontrol)):
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        **{"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)},
        **{"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "1", "LOG_DIR": str(tmp_path / "logs")},
        **{"NPROC_PER_NODE": "2", "MASTER_ADDR": "127.0.0.1", "PYTHON": sys.executable},
    }
    process = subprocess.Popen(
        ["bash", str(REPOSITORY / "scripts" / "slurm" / "launch.sh"), *_settings(tmp_path, text)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    _wait_for_steps(process, tmp_path)
    process.send_signal(signal.SIGUSR1)
    output = _end(process)
    assert "SIGUSR1: stopped at iteration" in output, output
    assert process.returncode == 0 and "requeueing" in output
    last = json.loads((tmp_path / "run" / METRICS_FILE).read_text().splitlines()[-1])["iteration"]
    called, *saved = log.read_text().splitlines()
    assert called == f"requeue {os.getpid()}" and f"iter_{last:07d}" in saved
