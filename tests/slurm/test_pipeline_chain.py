"""A pipeline that is submitted once: its steps are jobs of a real Slurm, one after the other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from spikingbrain_train.pipelines.state import STATE_FILE
from spikingbrain_train.reporting.metrics import METRICS_FILE, read_metrics
from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER, latest_iteration
from tests.slurm.cluster import Cluster, Job, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
# The first stage is preempted; the second one, of one node, looks at what it has left, the third fails.
PIPELINE = """
output: {output}
steps:
  train:
    kind: train
    launch: [sbatch, --wait, --nodes=2, --gpus-per-node=1, --cpus-per-task=1, --time=30,
      "--output={folder}/train.log", scripts/slurm/nvidia.sbatch]
    settings:
      model: tiny_hybrid
      model.vocab_size: 130
      stage: cpt
      parallel: single
      cluster: cpu
      cluster.peak_tflops: 0.1
      data.train: ["{text}"]
      stage.train_iters: {steps}
      stage.seq_length: 64
      stage.global_batch_size: 2
      stage.micro_batch_size: 1
      precision: fp32
      logging.log_interval: 1
      logging.tensorboard: false
      callbacks: [{{path: tests.slurm.pace.Pace, settings: {{seconds: 0.5, until: "{folder}/hurry"}}}}]
  look:
    kind: command
    command:
      - python
      - -c
      - import os; os.listdir('${{steps.train.checkpoint}}/iter_{steps:07d}');
        open('{output}/looked', 'w').write(os.environ['SLURM_JOB_NUM_NODES'])
    outputs: {{file: "{output}/looked"}}
  fail:
    kind: command
    command: [python, -c, "open('${{steps.look.file}}'); raise SystemExit(7)"]
    outputs: {{file: "{output}/never"}}
    sbatch: [--output={folder}/fail.log]
  after:
    kind: command
    command: [python, -c, "open('${{steps.fail.file}}')"]
    outputs: {{file: "{output}/after"}}
"""


def _last_step(output: Path) -> int:
    """In the metrics of the first stage."""
    run = output / "train"
    points = read_metrics(run) if (run / METRICS_FILE).exists() else []
    return int(points[-1]["iteration"]) if points else 0


def test_stages_follow_each_other_through_a_preemption_and_end_where_one_fails(
    cluster: Cluster, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    path = tmp_path / "road.yaml"
    path.write_text(PIPELINE.format(folder=tmp_path, output=output, text=text, steps=STEPS))
    variables = {
        "MASTER_ADDR": "127.0.0.1",
        "LOG_DIR": str(tmp_path / "nodes"),
        "HEALTH_CHECK": "no",
        "RANK_LOGS": "yes",
    }
    environment = {**cluster.environment, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **variables}

    def pipeline(command: str, *words: str) -> str:
        program = [sys.executable, "-m", "spikingbrain_train", "pipeline", command, str(path), *words]
        done = subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def logs() -> str:
        files = [*tmp_path.glob("*.log"), *tmp_path.glob("nodes/*.log")]
        return "\n".join([cluster.call("squeue"), *(file.read_text()[-3000:] for file in files)])

    options = f"--sbatch=--time=30 --output={tmp_path}/step.log"
    assert "4 jobs, each behind the one before" in pipeline("submit", options)
    records = json.loads((output / STATE_FILE).read_text())
    train, look, fail, after = (Job(cluster, record["job"]) for record in records.values())

    def saved() -> int:
        return latest_iteration(output / "train" / CHECKPOINT_FOLDER) or 0

    wait_until(lambda: _last_step(output) >= 3, 120, "step 3", logs)
    words = ("--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.log")
    urgent = cluster.submit(*words, "--wrap=sleep 1", cwd=tmp_path)
    wait_until(lambda: urgent.state == "COMPLETED", 90, "the urgent job is done", logs)
    stopped = saved()
    assert 3 <= stopped == _last_step(output) < STEPS, logs()
    assert train.facts()["Restarts"] == "1" and look.facts()["Reason"] == "Dependency", logs()
    lines = pipeline("status").splitlines()
    assert f"at iteration {stopped} of {STEPS}, submitted as job {train.number} (" in lines[0]
    assert f"submitted as job {look.number} (pending)" in lines[1]
    (tmp_path / "hurry").touch()
    wait_until(lambda: look.state in ("COMPLETED", "FAILED"), 150, "the second step has ended", logs)
    assert train.state == "COMPLETED" and look.state == "COMPLETED" and saved() == STEPS, logs()
    for node in (0, 1):  # one attempt a start; rank 0 speaks for both
        said = [
            log.read_text() for log in (tmp_path / "nodes").glob(f"ranks/node{node}/*/attempt_0/0/std*.log")
        ]
        assert len(said) == 4 and ("iteration" in "".join(said)) == (node == 0), logs()
    assert (output / "looked").read_text() == "1"
    wait_until(lambda: after.state == "CANCELLED", 60, "what is behind a failed step is dropped", logs)
    assert fail.state == "FAILED" and not (output / "after").exists(), logs()
    lines = pipeline("status").splitlines()
    assert "failed with exit code 7" in lines[2] and f"job {after.number} was cancelled" in lines[3]
    assert lines[-1].startswith("2 of 4 steps are done")
