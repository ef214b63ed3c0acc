"""The Slurm commands of docs/guides/first_run_on_a_cluster.md on a real Slurm of two nodes, in their order.

The others of that page are run by tests/docs/test_commands.py. Here the job trains a tiny model on one CPU
rank a node, with the settings of the page's file but for sizes.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from spikingbrain_train.reporting.metrics import METRICS_FILE, read_metrics
from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER, latest_iteration
from tests.docs.pages import Command, commands
from tests.docs.small import write_files
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.small_settings import small_settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
PAGE = "docs/guides/first_run_on_a_cluster.md"
PROGRAMS = ("sbatch", "squeue", "scancel", "tail")
OUTPUT = "outputs/first/run"
STEPS = 24
FIT = ("--gpus-per-node=1", "--cpus-per-task=1", "--time=60:00")
"""What a node of this cluster has, in the place of the script's own options."""


class Checkout:
    """A checkout with the page's file in it, on a login node."""

    def __init__(self, folder: Path, cluster: Cluster, text: Path) -> None:
        for name in ("train.py", "conf", "scripts", "spikingbrain_train", "tests"):
            (folder / name).symlink_to(ROOT / name)
        write_files(PAGE, folder)
        # What the search of a layout writes for 16 ranks.
        (folder / "my_conf/parallel").mkdir()
        (folder / "my_conf/parallel/first.yaml").write_text("data_parallel_size: 16\n")
        self.folder, self.cluster, self.text = folder, cluster, text
        self.output = folder / OUTPUT
        self.hurry = folder / "hurry"

    def call(self, command: Command, health_check: bool = True) -> str:
        """What a command of the page prints, started here."""
        words = [found for word in command.words for found in self._expanded(word)]
        if words[0] == "sbatch":
            words[1:1] = FIT
            if "--test-only" not in words:
                small = small_settings(self.text, OUTPUT, self.hurry, STEPS)
                words += ["logging=default", "checkpoint.load=null", "data.valid=[]", *small]
        variables = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
        variables["HEALTH_CHECK"] = "yes" if health_check else "no"
        done = subprocess.run(
            words,
            cwd=self.folder,
            env={**self.cluster.environment, **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stderr}\n{self.logs()}"
        return done.stdout + done.stderr

    def _expanded(self, word: str) -> list[str]:
        """What the shell makes of a pattern."""
        return sorted(str(path) for path in self.folder.glob(word)) if "*" in word else [word]

    def logs(self) -> str:
        """All that there is to see."""
        paths = [*self.folder.glob("first-*.log"), *self.folder.glob("outputs/slurm/*/node*.log")]
        return "\n".join(path.read_text(errors="replace")[-4000:] for path in sorted(paths))

    def steps(self) -> list[int]:
        """Those in the metrics."""
        done = (self.output / METRICS_FILE).exists()
        return [int(point["iteration"]) for point in read_metrics(self.output)] if done else []

    def states(self) -> list[tuple[str, str]]:
        """State and number of restarts of every job, in their order."""
        jobs = self.cluster.call("scontrol", "--oneliner", "show", "jobs").splitlines()
        facts = [dict(word.split("=", 1) for word in job.split() if "=" in word) for job in jobs]
        return [(job["JobState"], job["Restarts"]) for job in facts if "JobState" in job]

    def wait(self, holds: Callable[[], bool], what: str, seconds: float = 200) -> None:
        """Until something holds."""
        wait_until(holds, seconds, what, self.logs)


def test_the_slurm_commands_of_the_page_do_what_it_says(cluster: Cluster, tmp_path: Path, text: Path) -> None:
    checkout = Checkout(tmp_path, cluster, text)
    asked, submitted, listed, job_log, node_log, stopped, waiting, cancelled, again = [
        command for command in commands(PAGE) if command.words[0] in PROGRAMS
    ]
    assert "to start at" in checkout.call(asked) and checkout.states() == []

    checkout.call(submitted)
    assert "first" in checkout.call(listed)
    checkout.wait(lambda: len(checkout.steps()) >= 3, "step 3 is done")
    assert "2 nodes x 1 ranks" in (said := checkout.call(job_log)) and "health check: all in line" in said
    assert "first step" in (said := checkout.call(node_log)) and f"iteration  1/{STEPS}" in said

    checkout.call(stopped)
    checkout.wait(lambda: checkout.states()[0][1] == "1", "the job is requeued", 60)
    saved = latest_iteration(checkout.output / CHECKPOINT_FOLDER)
    assert saved == checkout.steps()[-1] < STEPS, checkout.logs()
    assert "first" in checkout.call(waiting)

    checkout.call(cancelled)
    checkout.wait(lambda: checkout.states()[0][0] == "CANCELLED", "the job is cancelled", 60)
    checkout.hurry.touch()
    assert checkout.call(again, health_check=False).startswith("Submitted batch job")
    checkout.wait(lambda: checkout.states()[-1][0] in ("COMPLETED", "FAILED"), "the second job is done")
    assert checkout.states() == [("CANCELLED", "1"), ("COMPLETED", "0")], checkout.logs()
    assert checkout.steps() == list(range(1, STEPS + 1)), checkout.logs()
    assert f"at iteration {saved} with its" in checkout.logs()
