"""The job of a single step of a pipeline (scripts/slurm/step.sbatch), with a stand-in for scontrol."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.scripts.allocation import Allocation
from tests.scripts.test_slurm import wait_for

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the launchers are bash scripts")

# Ends with 1 when it is told to stop, as a conversion does that has nothing to save.
TOLD = 'trap "exit 1" USR1; touch "$RECORD/ready"; while :; do sleep 0.02; done'


@pytest.fixture
def allocation(tmp_path: Path) -> Allocation:
    return Allocation(tmp_path)


@pytest.mark.parametrize(
    ("command", "variables", "code", "requeued"),
    [
        ("exit 0", {}, 0, False),
        ("exit 7", {}, 7, False),
        ("exit 75", {}, 0, True),
        ("exit 75", {"SLURM_RESTART_COUNT": "2", "MAX_REQUEUES": "2"}, 75, False),
        (TOLD, {}, 0, True),
    ],
    ids=["done", "failed", "saved", "too often", "told to stop"],
)
def test_a_step_that_was_stopped_goes_back_into_the_queue_and_one_that_fails_does_not(
    allocation: Allocation, command: str, variables: dict[str, str], code: int, requeued: bool
) -> None:
    words = allocation.command("bash", "-c", command, script="step.sbatch")
    with subprocess.Popen(
        words, env={**allocation.environment, **variables}, text=True, stdout=subprocess.PIPE
    ) as job:
        if command == TOLD:
            wait_for(allocation.record / "ready")
            job.send_signal(signal.SIGUSR1)
        said, _ = job.communicate(timeout=30)
    assert job.returncode == code
    assert (allocation.record / "scontrol").exists() is requeued is ("the step goes on later" in said)
