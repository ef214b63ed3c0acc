"""The Slurm launchers, with stand-ins for srun, scontrol and Python that write down how they were called."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.scripts.allocation import ROOT, SLURM, Allocation

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the launchers are bash scripts")


@pytest.fixture
def allocation(tmp_path: Path) -> Allocation:
    return Allocation(tmp_path)


@pytest.mark.parametrize(
    "script", sorted([*SLURM.glob("*.s*"), *SLURM.glob("env/*")]), ids=lambda path: path.name
)
def test_script_is_valid_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_one_torchrun_a_node_meets_on_the_first_node(allocation: Allocation) -> None:
    result = allocation.run("experiment=spikingbrain_7b_8k", 'data.train=[a b,"c"]')
    assert result.returncode == 0, result.stderr
    for node in (0, 1):  # the recorded file name carries the rank that torchrun was given on that node
        assert allocation.called(f"torchrun{node}") == [
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc-per-node=8",
            "--master-addr=node-a",
            "--master-port=16007",
            "train.py",
            "experiment=spikingbrain_7b_8k",
            'data.train=[a b,"c"]',
        ]
        assert "OMP_NUM_THREADS=8" in allocation.called(f"env{node}")
    options = allocation.called("srun")[: allocation.called("srun").index("bash")]
    assert options == [
        "--nodes=2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=64",
        "--kill-on-bad-exit=1",
        f"--output={allocation.log_dir}/node%n.log",
        "--open-mode=append",
    ]
    assert allocation.log_dir.is_dir()


def test_variables_override_what_slurm_says(allocation: Allocation) -> None:
    allocation.run(
        NPROC_PER_NODE="2", MASTER_ADDR="10.0.0.7", MASTER_PORT="1234", ENTRY="other.py", OMP_NUM_THREADS="3"
    )
    assert allocation.called("torchrun1")[2:] == [
        "--nnodes=2",
        "--nproc-per-node=2",
        "--master-addr=10.0.0.7",
        "--master-port=1234",
        "other.py",
    ]
    assert "OMP_NUM_THREADS=3" in allocation.called("env1")


def test_ranks_have_logs_of_their_own_where_that_is_asked_for(allocation: Allocation) -> None:
    assert allocation.run(RANK_LOGS="yes").returncode == 0
    seen = allocation.called("env1")
    assert "PET_TEE=3" in seen and f"PET_LOG_DIR={allocation.log_dir}/ranks/node1" in seen
    allocation.run()
    assert not any(line.startswith("PET_TEE") for line in allocation.called("env1"))
    for name in ("RANK_LOGS", "HEALTH_CHECK"):
        refused = allocation.run(**{name: "1"})
        assert refused.returncode == 2 and f"{name}=1 is neither yes nor no" in refused.stderr


@pytest.mark.parametrize(
    ("script", "cluster", "variable"),
    [
        ("nvidia.sbatch", "cluster=nvidia", "CUDA_DEVICE_MAX_CONNECTIONS=1"),
        ("metax.sbatch", "cluster=metax", "CUDA_PATH=/opt/elsewhere/tools/cu-bridge"),
        ("cpu.sbatch", "cluster=cpu", "CUDA_VISIBLE_DEVICES="),
    ],
)
def test_batch_script_chooses_its_cluster_first(
    allocation: Allocation, script: str, cluster: str, variable: str
) -> None:
    result = allocation.run("stage.train_iters=3", script=script, MACA_PATH="/opt/elsewhere")
    assert result.returncode == 0, result.stderr
    # First, so that a cluster=... of the user's, which comes later, wins.
    assert allocation.called("torchrun0")[-3:] == ["train.py", cluster, "stage.train_iters=3"]
    assert variable in allocation.called("env0")


def test_what_ranks_were_waiting_in_lies_beside_the_logs_of_the_job(allocation: Allocation) -> None:
    """torch's flight recorder, which writes it when a collective of NCCL is late."""
    variable = "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
    assert allocation.run(script="nvidia.sbatch").returncode == 0
    seen = allocation.called("env1")
    assert f"{variable}={allocation.log_dir}/nccl_trace_rank_" in seen
    assert "TORCH_NCCL_TRACE_BUFFER_SIZE=2000" in seen and "TORCH_NCCL_DUMP_ON_TIMEOUT=1" in seen
    allocation.run(script="nvidia.sbatch", **{variable: "/scratch/trace_"})
    assert f"{variable}=/scratch/trace_" in allocation.called("env1")


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({}, 540),
        ({"STOP_SECONDS": "120"}, 120),
        ({"STOP_SECONDS": "120", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}, 60),
    ],
)
def test_torchrun_gives_the_ranks_time_to_save_before_it_kills_them(
    allocation: Allocation, variables: dict[str, str], seconds: int
) -> None:
    allocation.run(**variables)
    assert f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={seconds}" in allocation.called("env1")


def test_a_task_of_a_submitted_sweep_has_its_own_arguments(allocation: Allocation, tmp_path: Path) -> None:
    (tmp_path / "1.args").write_text('data.train=[a b,"c"]\noutput_dir=it\'s $HOME\n')
    sweep = {"SWEEP_ARGUMENTS": str(tmp_path), "SLURM_ARRAY_TASK_ID": "1"}
    result = allocation.run(script="nvidia.sbatch", **sweep)
    assert result.returncode == 0, result.stderr
    expected = ["train.py", "cluster=nvidia", 'data.train=[a b,"c"]', "output_dir=it's $HOME"]
    assert allocation.called("torchrun0")[-4:] == expected
    refused = allocation.run(script="nvidia.sbatch", **{**sweep, "SLURM_ARRAY_TASK_ID": "2"})
    assert refused.returncode == 2 and "2.args is missing; submit the sweep again" in refused.stderr


def test_requeued_job_resumes_whatever_it_was_told_first(allocation: Allocation) -> None:
    allocation.run("checkpoint.resume=never", SLURM_RESTART_COUNT="1")
    assert allocation.called("torchrun0")[-2:] == ["checkpoint.resume=never", "checkpoint.resume=auto"]
    allocation.run("checkpoint.resume=never", SLURM_RESTART_COUNT="0")
    assert allocation.called("torchrun0")[-1] == "checkpoint.resume=never"


# A run that saves when it is told to stop, and ends as torchrun does then.
TRAINER = """
import os, signal, sys, time
from pathlib import Path
assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN, "torchrun would die of it"
warned = []
signal.signal(signal.SIGUSR1, lambda *_: warned.append(True))
record, node = Path(os.environ["RECORD"]), os.environ["PET_NODE_RANK"]
(record / f"ready{node}").touch()
while not warned:
    time.sleep(0.02)
time.sleep(float(os.environ["SAVING_TAKES"]))
(record / f"saved{node}").touch()
sys.exit(int(os.environ["EXIT_CODE"]))
"""


class TestWarning:
    """Slurm's SIGUSR1 ahead of the end."""

    @pytest.fixture
    def warned(self, allocation: Allocation, tmp_path: Path):
        """Runs a job, warns it, and returns (exit code, output, who had saved when the job was requeued)."""
        trainer = tmp_path / "trainer.py"
        trainer.write_text(TRAINER)

        def run(**variables: str) -> tuple[int, str, list[str]]:
            environment = {
                **allocation.environment,
                **{"TRAINER": str(trainer), "TRAINER_PYTHON": sys.executable},
                **{"EXIT_CODE": "1", "SAVING_TAKES": "0.3", **variables},
            }
            with subprocess.Popen(
                allocation.command(),
                env=environment,
                text=True,
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            ) as job:
                for node in (0, 1):
                    wait_for(allocation.record / f"ready{node}")
                job.send_signal(signal.SIGUSR1)
                output, _ = job.communicate(timeout=30)
            deadline = time.monotonic() + 10  # it is told to end, and needs a moment
            while naps := naps_of(job.pid):
                assert time.monotonic() < deadline, f"{naps} go on without their job"
                time.sleep(0.05)
            requeued = allocation.record / "saved_when_requeued"
            return job.returncode, output, requeued.read_text().split() if requeued.exists() else []

        return run

    def test_the_ranks_of_all_nodes_save_before_the_job_is_requeued(
        self, allocation: Allocation, warned
    ) -> None:
        code, output, saved = warned()
        assert allocation.called("scontrol") == ["requeue", "31007"]
        assert saved == ["saved0", "saved1"]
        assert code == 0 and "requeueing" in output and "failed" not in output

    def test_a_run_that_does_not_save_in_time_is_requeued_all_the_same(
        self, allocation: Allocation, warned
    ) -> None:
        code, output, saved = warned(STOP_SECONDS="0.2", SAVING_TAKES="2")
        assert allocation.called("scontrol") == ["requeue", "31007"]
        assert saved == [] and code == 0 and "has not saved in time" in output

    def test_a_run_that_ends_by_itself_is_not_requeued(self, allocation: Allocation, warned) -> None:
        code, output, _ = warned(EXIT_CODE="0")
        assert code == 0 and not (allocation.record / "scontrol").exists()


class TestHealthCheck:
    """What comes before the run."""

    def test_every_rank_of_every_node_checks_with_the_words_of_the_run(self, allocation: Allocation) -> None:
        words = ("stage.train_iters=3", 'data.train=[a b,"c"]')
        result = allocation.run(
            *words,
            script="nvidia.sbatch",
            **{"HEALTH_CHECK": None, "NPROC_PER_NODE": "2", "HEALTH_CHECK_ARGS": "--min-bandwidth 40"},
        )
        assert result.returncode == 0, result.stderr
        for rank in range(4):
            expected = ["-m", "spikingbrain_train", "health-check", "--min-bandwidth", "40"]
            assert allocation.called(f"check{rank}") == [*expected, "cluster=nvidia", *words]
            environment = allocation.called(f"check_env{rank}")
            assert {f"LOCAL_RANK={rank % 2}", "WORLD_SIZE=4", "LOCAL_WORLD_SIZE=2"} <= set(environment)
            assert {"MASTER_ADDR=node-a", "MASTER_PORT=16007"} <= set(environment)
        assert allocation.called("torchrun1")[-3:] == ["train.py", "cluster=nvidia", *words][-3:]

    def test_a_host_that_is_not_fit_fails_the_job_without_a_start_or_a_requeue(
        self, allocation: Allocation
    ) -> None:
        result = allocation.run(HEALTH_CHECK="yes", NPROC_PER_NODE="2", UNFIT="3")
        assert result.returncode == 2 and "failed its health check" in result.stderr
        # On sites with KillOnBadExit=1, too, rank 0 outlives the others and says what is wrong.
        assert "--kill-on-bad-exit=0" in allocation.called("srun")
        assert not (allocation.record / "torchrun0").exists()
        assert allocation.called("scontrol_calls") == ["show hostnames", "show job"]

    def test_another_script_is_started_without_its_words_being_checked(self, allocation: Allocation) -> None:
        allocation.run("--theirs", HEALTH_CHECK="yes", ENTRY="other.py", NPROC_PER_NODE="1")
        assert allocation.called("check1")[-1] == "health-check"


def test_failure_on_a_node_fails_the_job_and_names_the_logs(allocation: Allocation) -> None:
    result = allocation.run(EXIT_CODE="3")
    assert result.returncode == 3
    assert f"failed with exit code 3; see {allocation.log_dir}/node*.log" in result.stderr


def test_image_file_runs_under_apptainer(allocation: Allocation) -> None:
    result = allocation.run(
        script="nvidia.sbatch", CONTAINER_IMAGE="/images/train.sif", CONTAINER_MOUNTS="/data:/data"
    )
    assert result.returncode == 0, result.stderr
    image = allocation.called("apptainer1").index("/images/train.sif")
    assert allocation.called("apptainer1")[:image] == [
        "exec",
        "--pwd",
        str(ROOT),
        "--bind",
        "/data:/data",
        "--nv",
    ]
    assert allocation.called("torchrun1")[:2] == ["-m", "torch.distributed.run"]


def test_other_images_are_pyxis_options(allocation: Allocation) -> None:
    allocation.run(
        CONTAINER_IMAGE="registry#team/image:1", CONTAINER_ARGS="--no-container-mount-home --export=ALL"
    )
    options = allocation.called("srun")[: allocation.called("srun").index("bash")]
    assert options[-5:] == [
        "--container-image=registry#team/image:1",
        f"--container-mounts={ROOT}:{ROOT}",
        f"--container-workdir={ROOT}",
        "--no-container-mount-home",
        "--export=ALL",
    ]


@pytest.mark.parametrize(
    ("script", "missing", "advice"),
    [
        ("launch.sh", "SLURM_JOB_ID", "sbatch scripts/slurm/nvidia.sbatch"),
        ("launch.sh", "SLURM_GPUS_ON_NODE", "set NPROC_PER_NODE"),
        ("nvidia.sbatch", "SLURM_SUBMIT_DIR", "submit from the root of the checkout"),
    ],
)
def test_missing_piece_is_one_sentence(
    allocation: Allocation, script: str, missing: str, advice: str
) -> None:
    variables = {missing: None if missing != "SLURM_SUBMIT_DIR" else "/nowhere"}
    result = allocation.run(script=script, **variables)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert advice in result.stderr


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("NPROC_PER_NODE", "eight", "NPROC_PER_NODE=eight is no whole number"),
        ("NPROC_PER_NODE", "0", "NPROC_PER_NODE=0 starts nothing; give the number of ranks on each node"),
        ("MAX_REQUEUES", "-1", "MAX_REQUEUES=-1 is no whole number"),
    ],
)
def test_a_number_that_is_none_is_one_sentence(
    allocation: Allocation, variable: str, value: str, sentence: str
) -> None:
    result = allocation.run(**{variable: value})
    assert result.returncode == 2 and sentence in result.stderr and result.stderr.count("\n") == 1


def naps_of(job: int) -> list[str]:
    """What still runs of the session that ``job`` led."""
    naps = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = status.read_text().rpartition(")")
        except OSError:  # it has just ended
            continue
        state, _parent, _group, session, *_ = rest.split()
        if session == str(job) and state != "Z":
            naps.append(name)
    return naps


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
