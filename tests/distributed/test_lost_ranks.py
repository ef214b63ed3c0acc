"""Ranks that stop answering: the others say who is missing, and torchrun may start all of them again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spikingbrain_train.config.checkpoint_folder import latest_iteration
from spikingbrain_train.config.command_line import USER_ERROR
from spikingbrain_train.config.errors import CheckpointError
from spikingbrain_train.parallel.heartbeats import failed_collective
from spikingbrain_train.training.metrics import METRICS_FILE, read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 15.0


def test_a_failed_collective_is_told_from_other_errors() -> None:
    timed_out = "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 6000ms for recv operation"
    for words in (timed_out, "[gloo/transport/tcp/pair.cc:534] Connection closed by peer"):
        error = RuntimeError(words)
        assert failed_collective(error) is error
        wrapped = CheckpointError("the checkpoint cannot be read")
        wrapped.__cause__ = error
        assert failed_collective(wrapped) is error
    assert failed_collective(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert failed_collective(ValueError(timed_out)) is None
    assert failed_collective(None) is None


class Run:
    """train.py on two ranks under torchrun."""

    def __init__(self, folder: Path, text: Path, torchrun: tuple[str, ...], *settings: str) -> None:
        self.output = folder / "run"
        arguments = [
            *(
                "model=tiny_hybrid",
                "model.vocab_size=130",
                "cluster=cpu",
                "precision=fp32",
                "parallel=single",
            ),
            *(f"data.train=[{text}]", "stage.seq_length=64", "stage.global_batch_size=2"),
            *(f"output_dir={self.output}", "logging.log_interval=1", "logging.tensorboard=false"),
            *("cluster.peak_tflops=1", f"cluster.timeout_minutes={TIMEOUT_SECONDS / 60}", *settings),
        ]
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *torchrun]
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, str(REPOSITORY / "train.py"), *arguments],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for_step(self, number: int) -> None:
        metrics, deadline = self.output / METRICS_FILE, time.monotonic() + 200
        while not metrics.exists() or metrics.read_text().count("\n") < number:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def rank(self, number: int) -> int:
        """Process id of a rank, a child of torchrun."""
        pid = self.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            if f"RANK={number}".encode() in variables:
                return int(child)
        raise AssertionError("there is no such rank")

    def end(self, seconds: float) -> str:
        try:
            self.process.wait(seconds)
        finally:
            for rank in (0, 1):
                try:
                    os.kill(self.rank(rank), signal.SIGKILL)
                except (AssertionError, OSError):
                    continue
            if self.process.poll() is None:
                self.process.kill()
        return self.log.read_text()


linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks in /proc")


@linux
@pytest.mark.slow
def test_a_stopped_rank_is_named_in_one_sentence(tmp_path: Path, text: Path) -> None:
    run = Run(tmp_path, text, (), "stage.train_iters=100000")
    run.wait_for_step(3)
    os.kill(run.rank(1), signal.SIGSTOP)
    output = run.end(TIMEOUT_SECONDS + 100)
    assert run.process.returncode != 0
    (sentence,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "rank 1 of 2 did not answer in the step after iteration" in sentence
    assert f"cluster.timeout_minutes={TIMEOUT_SECONDS / 60:g}" in sentence
    assert f"exitcode  : {USER_ERROR}" in output
    assert "train.py" not in output.partition("error: ")[0].rpartition("Traceback")[2], "a traceback of ours"


@linux
@pytest.mark.slow
def test_ranks_that_torchrun_restarts_go_on_from_the_newest_checkpoint(tmp_path: Path, text: Path) -> None:
    iterations = 40
    run = Run(
        tmp_path,
        text,
        ("--max-restarts", "1"),
        f"stage.train_iters={iterations}",
        "checkpoint.save_interval=4",
    )
    run.wait_for_step(6)
    os.kill(run.rank(1), signal.SIGKILL)
    output = run.end(250)
    assert run.process.returncode == 0, output
    assert latest_iteration(run.output / "checkpoints") == iterations
    assert [point["iteration"] for point in read_metrics(run.output)][-1] == iterations
