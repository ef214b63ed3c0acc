"""Ranks that ``--nproc-per-node`` starts: refused in a second, ended with their own code."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.api import ProcessFailure
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from spikingbrain_train.commands.ranks import Ranks, exit_code, split
from spikingbrain_train.config.command_line import DIVERGED, GIVEN_UP, START_AGAIN, USER_ERROR
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.storage.checkpoint_folder import latest_iteration
from tests.commands.terminal import ENVIRONMENT, TRAIN, Terminal, settings


def test_flags_of_the_launcher_may_stand_anywhere() -> None:
    words = ["model=x", "--nproc-per-node", "2", "--cfg", "job", "--nnodes=3", "--master_addr=here", "-m"]
    ranks, others = split(words)
    assert others == ["model=x", "--cfg", "job", "-m"]
    assert ranks is not None and ranks.world_size() == 6
    assert ranks.words == ["--nproc-per-node=2", "--nnodes=3", "--master-addr=here"]
    assert split(others) == (None, others)


@pytest.mark.parametrize("flags", [{"nproc-per-node": "gpu"}, {"nnodes": "1:4"}])
def test_ranks_that_torchrun_has_yet_to_count_are_unknown(flags: dict[str, str]) -> None:
    assert Ranks(flags).world_size() is None


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", ""])
def test_a_wrong_number_of_ranks_is_refused(value: str) -> None:
    with pytest.raises(ConfigurationError, match="--nproc-per-node"):
        ranks, _ = split([f"--nproc-per-node={value}"])
        assert ranks is not None
        ranks.world_size()


def test_a_flag_without_value_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--nnodes needs a value"):
        split(["--nnodes", "--nproc-per-node", "2"])


def test_what_the_arguments_tell_is_refused_once_and_before_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from spikingbrain_train.commands.programs import train\n"
        "try: train()\nfinally: assert 'torch' not in sys.modules"
    )
    words = ["--nproc-per-node", "2", *settings(tmp_path), "parallel=tp2_pp2"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: the world size 2 is not divisible")
    assert done.stderr.count("\n") == 1


def test_a_rank_starts_no_ranks(tmp_path: Path) -> None:
    words = ["--nproc-per-node", "2", *settings(tmp_path)]
    done = subprocess.run(
        [*TRAIN, *words], env={**ENVIRONMENT, "RANK": "0", "LOCAL_RANK": "0"}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "a launcher has started this process as one" in done.stderr


INTERRUPTED = 128 + signal.SIGINT


@pytest.mark.parametrize(
    ("codes", "ends_with"),
    [
        (
            (-signal.SIGTERM, INTERRUPTED),
            INTERRUPTED,
        ),  # the agent ended rank 0, which was still importing torch
        ((USER_ERROR, -signal.SIGTERM), USER_ERROR),
        ((-GIVEN_UP, USER_ERROR), USER_ERROR),  # rank 1 has named and ended rank 0, which hung
        ((USER_ERROR, -signal.SIGKILL), 128 + signal.SIGKILL),  # rank 0 has missed rank 1
        ((-signal.SIGTERM, START_AGAIN), START_AGAIN),
        ((-signal.SIGTERM, -signal.SIGKILL), 128 + signal.SIGKILL),
        ((-signal.SIGTERM, -signal.SIGTERM), 128 + signal.SIGTERM),
        ((START_AGAIN, DIVERGED), DIVERGED),
        ((START_AGAIN, 1), 1),
    ],
)
def test_the_code_is_that_of_the_rank_that_was_the_cause(codes: tuple[int, ...], ends_with: int) -> None:
    failures = {
        rank: ProcessFailure(local_rank=rank, pid=0, exitcode=code, error_file="")
        for rank, code in enumerate(codes)
    }
    assert exit_code(ChildFailedError("train", failures)) == ends_with


@pytest.mark.slow
def test_ctrl_c_ends_with_the_runs_sentence_and_start_again(tmp_path: Path) -> None:
    terminal = Terminal(*TRAIN, "--nproc-per-node", "2", *settings(tmp_path))
    terminal.wait_for_steps(tmp_path / "run")
    terminal.press_ctrl_c()
    assert terminal.exit_code() == START_AGAIN, terminal.said
    assert "Traceback" not in terminal.said and "death signal" not in terminal.said
    last = terminal.said.strip().splitlines()[-1]
    found = re.search(r"SIGINT: stopped at iteration (\d+); start again to go on$", last)
    assert found is not None, terminal.said
    assert latest_iteration(tmp_path / "run" / "checkpoints") == int(found[1])


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_code_is_no_start_again(tmp_path: Path) -> None:
    terminal = Terminal(*TRAIN, "--nproc-per-node", "2", *settings(tmp_path))
    terminal.wait_for_steps(tmp_path / "run")
    ranks = psutil.Process(terminal.pid).children()
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGKILL)
    assert terminal.exit_code() == 128 + signal.SIGKILL, terminal.said
    assert "error: rank 1 was ended by SIGKILL, as the system does when memory runs out" in terminal.said


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.5, 4.0])
def test_ctrl_c_before_the_first_step_ends_without_a_traceback(tmp_path: Path, seconds: float) -> None:
    """Whoever it meets: this process as it imports torch, or the ranks as they start."""
    terminal = Terminal(*TRAIN, "--nproc-per-node", "2", *settings(tmp_path))
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        assert terminal.read(0.1), terminal.said
    terminal.press_ctrl_c()
    assert terminal.exit_code() == 128 + signal.SIGINT, terminal.said
    assert "Traceback" not in terminal.said
