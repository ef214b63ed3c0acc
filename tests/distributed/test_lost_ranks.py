"""Ranks that stop answering: the others say who is missing, and torchrun may start all of them again."""

from __future__ import annotations

import io
import os
import re
import signal
import threading
import time
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from spikingbrain_train.checkpoint.background import BackgroundWork
from spikingbrain_train.config.command_line import USER_ERROR
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.errors import CheckpointError, PlatformError
from spikingbrain_train.parallel.heartbeats import Heartbeats, failed_collective
from spikingbrain_train.parallel.last_signs import Sign, stack_of
from spikingbrain_train.parallel.process_groups import ProcessGroups, initialize
from spikingbrain_train.runtime.accelerator import detect
from spikingbrain_train.storage.checkpoint_folder import latest_iteration
from tests.distributed.forked_launch import ForkedLaunch
from tests.distributed.interrupted_runs import settings
from tests.distributed.pool import RankPool

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
    warning, last_seen, *stack = said[0].splitlines()
    assert "cluster.timeout_minutes=" in warning
    assert last_seen.startswith("rank 1 on ") and "iteration 7 done, was last seen at:" in last_seen
    assert stack[-1].startswith("  ") and stack[-1].endswith(" _fall_silent")


def _hang(groups: ProcessGroups, timeout_seconds: float) -> tuple[str, str]:
    """Rank 1 hangs beside a collective of the others. Returns their error, and what is printed."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed), Heartbeats(groups, timeout_seconds / 60) as heartbeats:
            heartbeats.follow(lambda: 7)
            torch.distributed.barrier()
            if groups.rank == 1:
                _reads_a_disk_that_is_gone(3 * timeout_seconds)
            else:
                torch.distributed.all_reduce(torch.ones(1))
    except PlatformError as error:
        return str(error), printed.getvalue()
    except SystemExit as end:
        return f"exit {end.code}", printed.getvalue()
    return "went on", printed.getvalue()


def _reads_a_disk_that_is_gone(seconds: float) -> None:
    time.sleep(seconds)


def _hang_in_a_short_world(timeout_seconds: float) -> tuple[str, str]:
    groups = initialize(ParallelConfig(), detect("cpu"), seed=1, timeout_minutes=timeout_seconds / 60)
    return _hang(groups, timeout_seconds)


def test_a_living_rank_that_hangs_is_named_with_its_stack(ranks: RankPool) -> None:
    said = ranks.run(_hang_in_a_short_world, 3.0, world_size=3, parallel=None)
    ((sentence, printed),) = [each for each in said if each[0] not in ("went on", f"exit {USER_ERROR}")]
    assert "all are alive: rank 1 did not wait for the others; look at the stack above" in sentence
    assert "rank 1 on " in printed and "iteration 7 done" in printed
    assert printed.rstrip().endswith(" _reads_a_disk_that_is_gone")
    assert said[1][0] == "went on"


def test_a_rank_that_waits_for_its_own_work_is_told_by_what_the_work_does() -> None:
    """The work may itself wait for other ranks; else they wait for it, as where its disk hangs."""
    for file, waits in (("/torch/distributed/distributed_c10d.py", True), ("/checkpoint/files.py", False)):
        ended = threading.Lock()
        names: dict[str, Any] = {}
        exec(compile("def waits(lock):\n  lock.acquire()", file, "exec"), names)
        with ended:
            work = BackgroundWork(partial(names["waits"], ended))
            loop = threading.Thread(target=work.result)
            loop.start()
            deadline = time.monotonic() + 20
            while not ((stack := stack_of(loop)) and file in stack[-1]):
                assert time.monotonic() < deadline, stack
            assert any(frame.endswith(" result") for frame in stack)
            assert Sign(beats=1, iteration=1, stack=stack).waits_for_others is waits
        loop.join()


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


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks in /proc")
@pytest.mark.slow
def test_a_stopped_rank_of_four_is_named_with_its_stack_and_the_run_ends_soon(
    tmp_path: Path, text: Path
) -> None:
    output = tmp_path / "run"
    timeout = f"cluster.timeout_minutes={TIMEOUT_SECONDS / 60}"
    words = settings(output, text, steps=100000, save_interval=100000, more=[timeout])
    with ForkedLaunch(output, tmp_path / "log", 4, words) as launch:
        assert launch.wait_for(lambda: launch.iteration() >= 3), launch.tail()
        stopped = launch.pids()[2]
        os.kill(stopped, signal.SIGSTOP)
        launch.process.wait(TIMEOUT_SECONDS + 15)
        assert launch.process.returncode != 0
        log = launch.log.read_text()
        done = launch.iteration()
    (sentence,) = [line for line in log.splitlines() if line.startswith("error: ")]
    step = re.search(r"rank 2 of 4 did not answer in the step after iteration (\d+) ", sentence)
    assert step is not None and int(step[1]) in (done, done + 1), sentence
    assert f"process {stopped} is stopped by a signal" in sentence
    assert log.count("warning: rank 2 of 4 has not answered for") == 1
    shown = log.rpartition(f"(process {stopped}), iteration ")[2].partition("error: ")[0]
    assert re.search(r"was last seen at:\n(  \S+:\d+ \S+\n)+", shown), log
    assert f"exitcode  : {USER_ERROR}" in log
    assert "Traceback" not in log.partition("error: ")[0], "a traceback of ours"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks in /proc")
@pytest.mark.slow
def test_ranks_that_torchrun_restarts_go_on_from_memory(tmp_path: Path, text: Path) -> None:
    """No checkpoint is on the disk when a rank is killed."""
    output, memory = tmp_path / "run", tmp_path / "memory"
    memory.mkdir()
    kept = ["checkpoint.memory_interval=3", f"checkpoint.memory_folder={memory}"]
    kept.append("cluster.timeout_minutes=0.5")  # how long one that lost another looks for it follows from it
    words = settings(output, text, steps=30, save_interval=1000, more=kept)
    with ForkedLaunch(output, tmp_path / "log", 2, words, restarts=1) as launch:
        assert launch.wait_for(lambda: launch.iteration() >= 8), launch.tail()
        assert latest_iteration(output / "checkpoints") is None
        os.kill(launch.pids()[1], signal.SIGKILL)
        launch.process.wait(250)
        log = launch.log.read_text()
        assert launch.process.returncode == 0, log
    assert latest_iteration(output / "checkpoints") == 30
    found = re.search(r"going on from the copies in memory of iteration (\d+)", log)
    assert found and int(found[1]) >= 3, log
    assert list(memory.iterdir()) == []
