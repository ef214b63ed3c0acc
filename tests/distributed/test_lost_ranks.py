"""Ranks that stop answering: the others say who is missing, and torchrun may start all of them again."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch

from spikingbrain_train.config.command_line import USER_ERROR
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.errors import CheckpointError, PlatformError
from spikingbrain_train.parallel.heartbeats import Heartbeats, failed_collective
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.metrics import METRICS_FILE, read_metrics
from spikingbrain_train.storage.checkpoint_folder import latest_iteration
from tests.distributed.pool import RankPool

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 15.0
TIMED_OUT = "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 6000ms for recv operation"


def test_a_failed_collective_is_told_from_other_errors() -> None:
    for words in (TIMED_OUT, "[gloo/transport/tcp/pair.cc:534] Connection closed by peer"):
        error = RuntimeError(words)
        assert failed_collective(error) is error
        wrapped = CheckpointError("the checkpoint cannot be read")
        wrapped.__cause__ = error
        assert failed_collective(wrapped) is error
    assert failed_collective(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert (
        failed_collective(RuntimeError("unable to mmap 4096 bytes from file </data/igloo/text.bin>")) is None
    )
    assert failed_collective(ValueError(TIMED_OUT)) is None
    assert failed_collective(None) is None


@pytest.mark.parametrize(
    ("words", "is_lost"),
    [
        (
            "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran for 600010 milliseconds",
            True,
        ),
        ("wait timeout after 600000ms, keys: /default_pg/0//cuda//0", True),
        ("ncclRemoteError: A call failed possibly due to a network error or a remote process exiting", True),
        ("ncclSystemError: socketProgress: Connection closed by remote peer node-b<41234>", True),
        ("ncclUnhandledCudaError: Call to CUDA function failed. Cuda failure 2 'out of memory'", False),
        ("ncclSystemError: socketStartConnect: Connect to 10.0.0.7<41234> failed : No route to host", False),
        (
            "ncclSystemError: socketPollConnect: connect returned Connection timed out, exceeded retries",
            False,
        ),
        ("ncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1b000", False),
    ],
)
def test_of_nccls_errors_only_those_of_lost_ranks_are_explained(words: str, is_lost: bool) -> None:
    error = torch.distributed.DistBackendError(words)
    assert failed_collective(error) is (error if is_lost else None)


def _fail(groups: ProcessGroups, fails_after: list[float | None], timeout_seconds: float) -> str:
    """A rank waits in vain after its number of seconds, or goes on for long. Returns what it says."""
    try:
        with Heartbeats(groups, timeout_seconds / 60):
            torch.distributed.barrier()
            after = fails_after[groups.rank]
            time.sleep(6.0 if after is None else after)
            if after is not None:
                raise RuntimeError(TIMED_OUT)
    except PlatformError as error:
        return str(error)
    except SystemExit as end:
        return f"exit {end.code}"
    return "went on"


def test_who_waits_in_vain_speaks_although_a_lower_rank_is_only_slow(ranks: RankPool) -> None:
    slow, waiting = ranks.run(_fail, [None, 0.5], 6.0, world_size=2, parallel=ParallelConfig())
    assert slow == "went on"
    assert "ranks waited for each other" in waiting and "all are alive" in waiting


def test_the_first_of_three_that_wait_in_vain_speaks_for_all(ranks: RankPool) -> None:
    # It ends first, and its launcher would end the others before they have spoken.
    said = ranks.run(_fail, [1.5, 1.0, 0.5], 6.0, world_size=3, parallel=ParallelConfig())
    assert said[:2] == [f"exit {USER_ERROR}"] * 2
    assert "ranks waited for each other" in said[2]


def _fall_silent(groups: ProcessGroups, timeout_seconds: float) -> str:
    """Rank 1 writes nothing from some time on. Returns what this rank's thread printed."""
    printed = io.StringIO()
    with redirect_stderr(printed), Heartbeats(groups, timeout_seconds / 60) as heartbeats:
        heartbeats.follow(lambda: 7)
        torch.distributed.barrier()
        time.sleep(0.5)
        if groups.rank == 1:
            heartbeats._ended.set()  # as a stopped process: no leave is taken
        time.sleep(1.5 * timeout_seconds)
    return printed.getvalue()


def test_a_silent_rank_is_named_before_the_timeout_ends_the_process(ranks: RankPool) -> None:
    said = ranks.run(_fall_silent, 4.0, world_size=3, parallel=ParallelConfig())
    assert said[1:] == ["", ""]  # its neighbour speaks, once
    assert said[0].startswith("warning: rank 1 of 3 has not answered for 3 s in the step after iteration 7")
    assert said[0].count("\n") == 1 and "cluster.timeout_minutes=" in said[0]


def _leave_early(groups: ProcessGroups, timeout_seconds: float) -> str:
    printed = io.StringIO()
    with redirect_stderr(printed), Heartbeats(groups, timeout_seconds / 60):
        torch.distributed.barrier()
        time.sleep(0.3 if groups.rank == 1 else timeout_seconds)
    return printed.getvalue()


def test_a_rank_that_has_ended_as_it_should_is_not_missed(ranks: RankPool) -> None:
    assert ranks.run(_leave_early, 3.0, world_size=2, parallel=ParallelConfig()) == ["", ""]


class _ShakyStore(torch.distributed.HashStore):
    """Fails at its second request, as a connection that is lost for a moment."""

    requests = 0

    def set(self, key: str, value: str) -> None:
        type(self).requests += 1
        if type(self).requests == 2:
            raise torch.distributed.DistNetworkError("failed to send, got error 32: Broken pipe")
        super().set(key, value)


class _FirstOfTwo:
    rank, world_size = 0, 2


def test_a_living_rank_goes_on_beating_after_its_connection_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "1")
    store = _ShakyStore()
    heartbeats = Heartbeats(_FirstOfTwo(), 0.6 / 60)  # type: ignore[arg-type]
    monkeypatch.setattr(heartbeats, "_connect", lambda: store)
    with heartbeats:
        deadline = time.monotonic() + 20
        while _ShakyStore.requests < 4:
            assert time.monotonic() < deadline, "it has stopped"
            time.sleep(0.02)


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
        while not metrics.exists() or metrics.read_text().count("train/loss") < number:
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

    def wait_for_words(self, words: str, seconds: float) -> None:
        """Until the log has them, or the run ends without."""
        deadline = time.monotonic() + seconds
        while words not in self.log.read_text() and self.process.poll() is None:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

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
    stopped = run.rank(1)
    os.kill(stopped, signal.SIGSTOP)
    # torchrun asks it to end, which a stopped process cannot hear, and would wait half a minute for it.
    run.wait_for_words(f"Sending process {stopped} closing signal", TIMEOUT_SECONDS + 100)
    os.kill(stopped, signal.SIGKILL)
    output = run.end(100)
    assert run.process.returncode != 0
    (sentence,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "rank 1 of 2 did not answer in the step after iteration" in sentence
    assert output.count("warning: rank 1 of 2 has not answered for") == 1
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
