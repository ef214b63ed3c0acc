"""Jobs of scripts/slurm on a real Slurm: what a cluster does to a run, and that the run goes on.

The cluster is two nodes on this machine (cluster.py). Each job is ``nvidia.sbatch`` as users submit it, one
rank a node, on the CPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spikingbrain_train.reporting.metrics import METRICS_FILE, read_metrics
from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER, latest_iteration
from tests.slurm.cluster import Cluster, Job, processes_with, wait_until
from tests.slurm.small_settings import SAVE_INTERVAL, small_settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40


class Run:
    """A job and the run in it."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        text: Path,
        *further: str,
        steps: int = STEPS,
        with_gpus: bool = True,
        health_check: bool = False,
        entry: Path | None = None,
    ) -> None:
        self.folder = folder
        self.output = folder / "run"
        self.hurry = folder / "hurry"
        variables = {
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "MASTER_ADDR": "127.0.0.1",
            "LOG_DIR": str(folder / "nodes"),
            "HEALTH_CHECK": "yes" if health_check else "no",
            **({} if entry is None else {"ENTRY": str(entry)}),
        }
        settings = (*small_settings(text, self.output, self.hurry, steps), *further)
        options = ("--nodes=2", "--cpus-per-task=1", "--time=60:00", f"--output={folder}/job.log")
        if with_gpus:
            job = ("--gpus-per-node=1", "scripts/slurm/nvidia.sbatch", *settings)
        else:  # Slurm 22.05 gives a requeued job no more of the GPUs of a node that was down
            job = ("scripts/slurm/cpu.sbatch", *settings)
        self.job: Job = cluster.submit(*options, *job, cwd=ROOT, variables=variables)

    @property
    def log(self) -> str:
        """What the batch script has said."""
        path = self.folder / "job.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def logs(self) -> str:
        """All that there is to see."""
        nodes = [path.read_text(errors="replace")[-4000:] for path in sorted(self.folder.glob("nodes/*.log"))]
        facts = self.job.facts()
        state = f"{facts['JobState']}, reason {facts['Reason']}"
        return "\n".join([state, self.log, *nodes])

    def iteration(self) -> int:
        """The last step in the metrics."""
        points = read_metrics(self.output) if (self.output / METRICS_FILE).exists() else []
        return int(points[-1]["iteration"]) if points else 0

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        """Until that step is in the metrics."""
        wait_until(lambda: self.iteration() >= step, seconds, f"step {step} is done", self.logs)

    def wait_for(self, *states: str, seconds: float = 150) -> None:
        """Until the job is in one of the states, as Slurm calls them."""
        wait_until(lambda: self.job.state in states, seconds, f"the job is {' or '.join(states)}", self.logs)

    def saved(self) -> int:
        """Iteration of the newest checkpoint."""
        return latest_iteration(self.output / CHECKPOINT_FOLDER) or 0

    def check_curve(self, steps: int) -> None:
        """The metrics have each step once, and the last one is saved."""
        assert [point["iteration"] for point in read_metrics(self.output)] == list(range(1, steps + 1)), (
            self.logs()
        )
        assert self.saved() == steps, self.logs()


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path, text: Path) -> Iterator[Callable[..., Run]]:
    """Submit a run; what a test leaves in the queue is cancelled."""
    yield lambda *further, **settings: Run(cluster, tmp_path, text, *further, **settings)
    cluster.call("scancel", "--full", "--signal=KILL", "--user=root")
    cluster.call("scancel", "--user=root")
    wait_until(lambda: not cluster.call("squeue", "--noheader"), 60, "the queue is empty", cluster.logs)


def test_a_run_goes_on_after_a_warning_ahead_of_its_time_limit(submit) -> None:
    run = submit()
    run.wait_for_step(3)
    run.job.signal_batch("USR1")  # as --signal=B:USR1@600 does, ten minutes ahead
    run.wait_for("PENDING", "COMPLETED", "FAILED", seconds=60)
    warned = run.iteration()
    assert 3 <= run.saved() == warned < STEPS, run.logs()
    assert "requeueing; it will continue from its newest checkpoint" in run.log
    run.hurry.touch()
    run.wait_for("COMPLETED", "FAILED")
    assert "start 2: 2 nodes x 1 ranks" in run.log
    assert run.job.state == "COMPLETED" and run.job.facts()["Restarts"] == "1", run.logs()
    run.check_curve(STEPS)
    assert sorted(path.name for path in (run.folder / "nodes").iterdir()) == ["node0.log", "node1.log"]


def test_a_node_that_goes_down_costs_the_steps_since_the_last_checkpoint_and_a_cancelled_job_none(
    submit, cluster: Cluster
) -> None:
    run = submit(steps=100000, with_gpus=False)
    run.wait_for_step(SAVE_INTERVAL + 2)
    cluster.kill_node("n2")
    wait_until(lambda: "n2" in cluster.down(), 60, "Slurm sees that n2 is down", run.logs)
    saved = run.saved()
    assert saved >= SAVE_INTERVAL and saved % SAVE_INTERVAL == 0
    cluster.start_node("n2")
    resumed = f"at iteration {saved} with its"
    wait_until(lambda: resumed in run.logs(), 150, "the job goes on from its checkpoint", run.logs)
    run.wait_for_step(saved + SAVE_INTERVAL + 2)
    restarts = run.job.facts()["Restarts"]
    assert int(restarts) >= 1
    cluster.call("scancel", run.job.number)
    run.wait_for("CANCELLED", seconds=60)
    number = f"SLURM_JOB_ID={run.job.number}"
    wait_until(
        lambda: not processes_with(number, f"SLURM_CONF={cluster.folder}/slurm.conf"), 40, "all end", run.logs
    )
    run.check_curve(run.iteration())
    assert run.job.state == "CANCELLED" and run.job.facts()["Restarts"] == restarts


def test_a_run_that_fails_on_fit_nodes_fails_its_job_with_its_sentence_and_is_not_requeued(
    submit, tmp_path: Path
) -> None:
    # What the run is told behind the health check's back.
    entry = tmp_path / "fails.py"
    starts = "runpy.run_path('train.py', run_name='__main__')"
    entry.write_text(f"import runpy, sys\nsys.argv.append('stage.train_iters=0')\n{starts}\n")
    run = submit(health_check=True, entry=entry)
    run.wait_for("COMPLETED", "FAILED", seconds=90)
    hosts = [line.split() for line in run.log.splitlines() if line.startswith(("n1 ", "n2 "))]
    assert [(host, rank) for host, rank, *_ in hosts] == [("n1", "0"), ("n2", "1")], run.logs()
    assert "health check: all in line" in run.log
    assert run.job.state == "FAILED" and run.job.facts()["Restarts"] == "0"
    assert "stage.train_iters" in run.logs() and os.listdir(run.folder / "nodes") != []


def test_an_allocation_that_does_not_fit_the_layout_fails_at_its_health_check_with_one_sentence(
    submit,
) -> None:
    run = submit("parallel.tensor_model_parallel_size=4", with_gpus=False, health_check=True)
    run.wait_for("COMPLETED", "FAILED", seconds=60)
    assert run.job.state == "FAILED" and run.job.facts()["Restarts"] == "0"
    (sentence,) = [line for line in run.log.splitlines() if line.startswith("error: ")]
    assert "the world size 2 is not divisible by" in sentence, run.logs()
    assert "start 4 ranks or a multiple of it (this Slurm job has 2 x 1: sbatch --nodes=4)" in sentence
    assert "failed its health check, and no run was started" in run.log
    assert not list(run.folder.glob("nodes/*.log"))
