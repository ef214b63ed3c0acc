"""The job of a single step of a pipeline (scripts/slurm/step.sbatch), with stand-ins for what it calls."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.scripts.allocation import ROOT, Allocation
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


# Stands for any step: writes down what it was started as.
STEP = ("/theirs/bin/python", "-m", "spikingbrain_train", "pipeline", "run", "road", "--step", "words")


def test_a_step_has_the_variables_and_the_container_that_other_jobs_have(
    allocation: Allocation, tmp_path: Path
) -> None:
    site = tmp_path / "site.env"
    site.write_text("export NCCL_DEBUG=INFO\n")
    shows = ("bash", "-c", 'env > "$RECORD/env"')
    assert allocation.run(*shows, script="step.sbatch", CLUSTER_ENV=str(site)).returncode == 0
    assert "NCCL_DEBUG=INFO" in allocation.called("env")
    assert allocation.run(*shows, script="step.sbatch", CLUSTER_ENV="cpu").returncode == 0
    assert "CUDA_VISIBLE_DEVICES=" in allocation.called("env")

    # In an image its own interpreter: PYTHON, or the one on its PATH.
    image = {"CONTAINER_IMAGE": "/images/train.sif", "CLUSTER_ENV": "nvidia", "PET_NODE_RANK": "0"}
    assert allocation.run(*STEP, script="step.sbatch", **image).returncode == 0
    words = allocation.called("apptainer0")
    assert words == [
        *("exec", "--pwd", str(ROOT), "--bind", f"{ROOT}:{ROOT}", "--nv", "/images/train.sif"),
        *(allocation.environment["PYTHON"], *STEP[1:]),
    ]
    image = {"CONTAINER_IMAGE": "registry#team/image:1", "SLURM_CPUS_PER_TASK": "7"}
    assert allocation.run("bash", "-c", "exit 0", script="step.sbatch", **image).returncode == 0
    assert allocation.called("srun") == [
        *("--nodes=1", "--ntasks=1", "--cpus-per-task=7", "--container-image=registry#team/image:1"),
        *(f"--container-mounts={ROOT}:{ROOT}", f"--container-workdir={ROOT}", "bash", "-c", "exit 0"),
    ]


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"CLUSTER_ENV": "amd"}, "CLUSTER_ENV=amd names no variables; there are cpu, metax, nvidia, or"),
        ({"MAX_REQUEUES": "many"}, "MAX_REQUEUES=many is no whole number; correct or unset it"),
        ({"SLURM_SUBMIT_DIR": "/nowhere"}, "submit from the root of the checkout"),
    ],
)
def test_a_step_whose_surroundings_are_wrong_is_refused_with_one_sentence(
    allocation: Allocation, variables: dict[str, str], sentence: str
) -> None:
    refused = allocation.run("true", script="step.sbatch", **variables)
    assert refused.returncode == 2 and sentence in refused.stderr and refused.stderr.count("\n") == 1
