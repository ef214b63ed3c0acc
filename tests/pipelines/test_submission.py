"""A pipeline as a chain of Slurm jobs, with stand-ins for sbatch, squeue, sacct, scancel and scontrol.

tests/slurm submits one to a real Slurm.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.pipelines import command_line
from spikingbrain_train.pipelines.command_line import pipelines
from spikingbrain_train.pipelines.plan import Pipeline, plan_pipeline
from spikingbrain_train.pipelines.state import STATE_FILE

ROOT = Path(__file__).parents[2]

# Each writes its words down, a line a call. sbatch gives numbers from 101 on, and refuses what REFUSED names.
STAND_INS = {
    "sbatch": 'case "$*" in *"${REFUSED:-nobody}"*) echo "sbatch: error: Invalid" >&2; exit 1;; esac\n'
    'echo $((100 + $(grep -c ^sbatch "$CALLS")))',
    "squeue": 'cat "$QUEUE"',
    "sacct": 'cat "$ACCOUNTS" 2> /dev/null || { echo "Slurm accounting storage is disabled" >&2; exit 1; }',
    "scancel": "",
    "scontrol": "",
}
PIPELINE = """
output: {output}
variables: {{nodes: 2}}
steps:
  words:
    kind: command
    command: [python, -c, "open('{output}/words', 'w')"]
    outputs: {{file: "{output}/words"}}
    sbatch: [--mem=4G]
  train:
    kind: command
    command: [sbatch, --wait, "--nodes=${{nodes}}", scripts/slurm/nvidia.sbatch, "${{steps.words.file}}"]
    outputs: {{file: "{output}/train"}}
  last:
    kind: command
    command: [spikingbrain-plot, "${{steps.train.file}}"]
    outputs: {{file: "{output}/last"}}
"""


class Slurm:
    """The stand-ins and what they were asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._calls, self._queue, self._accounts = folder / "calls", folder / "queue", folder / "accounts"
        self.programs = programs = folder / "bin"
        programs.mkdir()
        self._calls.touch()
        self.queue()
        for name, does in STAND_INS.items():
            (programs / name).write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{does}\n')
            (programs / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(programs), prepend=":")
        monkeypatch.setenv("CALLS", str(self._calls))
        monkeypatch.setenv("QUEUE", str(self._queue))
        monkeypatch.setenv("ACCOUNTS", str(self._accounts))

    def queue(self, *lines: str) -> None:
        """What squeue is going to say."""
        self._queue.write_text("".join(f"{line}\n" for line in lines))

    def accounts(self, *lines: str) -> None:
        """What sacct is going to say; it has no accounts before."""
        self._accounts.write_text("".join(f"{line}\n" for line in lines))

    def calls(self) -> list[str]:
        """Of all stand-ins so far, which are forgotten."""
        lines = self._calls.read_text().splitlines()
        self._calls.write_text("")
        return lines


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.chdir(ROOT)
    return Slurm(tmp_path, monkeypatch)


@pytest.fixture
def pipeline(tmp_path: Path) -> str:
    path = tmp_path / "road.yaml"
    path.write_text(PIPELINE.format(output=tmp_path / "out"))
    return str(path)


def test_every_step_is_a_job_behind_the_one_before_with_nodes_and_time_of_its_own(
    slurm: Slurm, pipeline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipelines(["submit", pipeline, "nodes=3", "--sbatch=--time=60"])
    own = f"{sys.executable} -m spikingbrain_train pipeline run {pipeline} nodes=3 --step"
    step, after = "scripts/slurm/step.sbatch", "--kill-on-invalid-dep=yes"
    assert slurm.calls() == [
        f"sbatch --parsable --job-name=road-words --hold --time=60 --mem=4G {step} {own} words",
        f"sbatch --parsable --job-name=road-train --dependency=afterok:101 {after} --nodes=3 "
        f"scripts/slurm/nvidia.sbatch {tmp_path}/out/words",
        f"sbatch --parsable --job-name=road-last --dependency=afterok:102 {after} --time=60 "
        f"{step} {own} last",
        "scontrol release 101",
    ]
    assert "3 jobs, each behind the one before; 0 steps are done" in capsys.readouterr().out
    records = json.loads((tmp_path / "out" / STATE_FILE).read_text())
    assert [record["job"] for record in records.values()] == ["101", "102", "103"]

    # Nobody fills the folder twice; steps that are done are left out the next time.
    slurm.queue("102 RUNNING", "103 PENDING", "7 RUNNING")
    for command in (["submit"], ["run"], ["run", "--fresh"]):
        with pytest.raises(SystemExit, match="2"):
            pipelines([*command, pipeline, "nodes=3"])
        said = capsys.readouterr().err
        assert "train (102, running), last (103, pending); wait for them, or take them out with" in said
    slurm.calls()
    slurm.queue()
    pipelines(["run", pipeline, "nodes=3", "--step", "words"])  # as the first job does
    pipelines(["status", pipeline, "nodes=3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[-4:-1]] == ["words", "train", "last"]
    assert "done" in lines[-4] and "submitted as job 102 (unknown: Slurm no longer" in lines[-3]
    pipelines(["submit", pipeline, "nodes=3"])
    assert [call.split()[2] for call in slurm.calls() if call.startswith("sbatch")] == [
        "--job-name=road-train",
        "--job-name=road-last",
    ]


def test_status_asks_slurm_once_for_all_jobs_and_says_what_has_become_of_each(
    slurm: Slurm, pipeline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def status() -> list[str]:
        pipelines(["status", pipeline])
        return [line.partition("  ")[2].strip() for line in capsys.readouterr().out.splitlines()[-4:-1]]

    pipelines(["submit", pipeline])
    slurm.calls()
    capsys.readouterr()
    slurm.queue("101 COMPLETING", "102 PENDING", "7 RUNNING", "103 PENDING")
    assert status() == [
        f"submitted as job {job}" for job in ("101 (completing)", *("102 (pending)", "103 (pending)"))
    ]
    assert slurm.calls() == ["squeue --noheader --states=all --format=%A %T"]
    slurm.queue("101 TIMEOUT")
    assert status() == [
        "job 101 was ended by its time limit",
        "submitted as job 102 (unknown: Slurm no longer knows it)",
        "submitted as job 103 (unknown: Slurm no longer knows it)",
    ]
    slurm.accounts("102|NODE_FAIL", "103|CANCELLED by 1000")
    assert status()[1:] == ["job 102 failed with its node", "job 103 was cancelled"]
    asks = "sacct --noheader --allocations --parsable2 --format=JobIDRaw,State --jobs=102,103"
    assert slurm.calls()[1::2] == [asks, asks]
    slurm.queue("101 FAILED", "102 COMPLETED", "103 OUT_OF_MEMORY")
    assert status() == [
        "job 101 failed",
        "job 102 ended well, but its result is not complete",
        "job 103 ran out of memory",
    ]

    # Jobs that have left the queue stop nobody; a step that ran elsewhere is no job's any more.
    with pytest.raises(SystemExit):
        pipelines(["run", pipeline])
    assert [call.split()[:2] for call in slurm.calls()][-2:] == [
        ["squeue", "--noheader"],
        ["sbatch", "--wait"],
    ]
    assert (
        status()[0].startswith("done")
        and json.loads((tmp_path / "out" / STATE_FILE).read_text())["words"]["job"] == ""
    )
    (slurm.programs / "squeue").unlink()
    monkeypatch.setenv("PATH", str(slurm.programs))
    assert (
        status()[2]
        == "submitted as job 103 (unknown: squeue is not installed here; go to a login node of the cluster)"
    )
    slurm.calls()
    for name in ("train", "last"):
        (tmp_path / "out" / name).touch()
    state = tmp_path / "out" / STATE_FILE
    records = json.loads(state.read_text())
    pipelines(["run", pipeline])  # all are done: nobody has to be asked
    assert "all 3 steps are done" in capsys.readouterr().out and records["last"]["job"] == "103"


def test_of_two_submissions_at_once_one_is_refused_and_a_finished_pipeline_submits_nothing(
    slurm: Slurm, pipeline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def plan_slowly(*arguments: Any, **settings: Any) -> Pipeline:
        planned = plan_pipeline(*arguments, **settings)
        monkeypatch.setattr(command_line, "plan_pipeline", plan_pipeline)
        pipelines(["submit", pipeline])
        slurm.queue("101 PENDING")
        return planned

    monkeypatch.setattr(command_line, "plan_pipeline", plan_slowly)
    with pytest.raises(SystemExit, match="2"):
        pipelines(["submit", pipeline])
    assert "steps of this pipeline are in Slurm's queue: words (101, pending)" in capsys.readouterr().err
    assert [call.split()[0] for call in slurm.calls()].count("sbatch") == 3

    short = tmp_path / "short.yaml"
    short.write_text(PIPELINE.format(output=tmp_path / "short").partition("  train:")[0])
    pipelines(["run", str(short), "--step", "words"])
    pipelines(["submit", str(short)])
    assert capsys.readouterr().out.splitlines()[-1] == f"all 1 steps are done, in {tmp_path}/short"
    assert slurm.calls() == []


def test_where_slurm_refuses_a_job_those_before_it_are_dropped_and_none_has_begun(
    slurm: Slurm, pipeline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("REFUSED", "road-last")
    with pytest.raises(SystemExit, match="2"):
        pipelines(["submit", pipeline])
    calls = slurm.calls()
    assert "--hold" in calls[0] and calls[-1] == "scancel 101 102" and "scontrol release 101" not in calls
    assert "error: sbatch refuses: sbatch: error: Invalid" in capsys.readouterr().err
    records = json.loads((tmp_path / "out" / STATE_FILE).read_text())
    assert {record["job"] for record in records.values()} == {""}


def test_a_dry_submission_prints_the_calls_and_a_wrong_one_is_one_sentence(
    slurm: Slurm, pipeline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    pipelines(["submit", "--dry-run", pipeline])
    said = capsys.readouterr().out
    assert "sbatch --job-name=road-last '--dependency=afterok:<train>' --kill-on-invalid-dep=yes" in said
    assert slurm.calls() == [] and not (tmp_path / "out").exists()
    for words, sentence in (
        ([pipeline, "steps.words.sbatch=4G"], "sbatch=4G must be a list of its options, e.g. [--gpus-per"),
        ([pipeline, "steps.words.sbatch=[4G]"], "must be a list of its options"),
        ([pipeline, "--sbatch=--comment='a"], "--sbatch=--comment='a is not a list of options (No closing"),
    ):
        with pytest.raises(SystemExit, match="2"):
            pipelines(["submit", *words])
        assert sentence in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        pipelines(["run", pipeline, "--step", "last"])
    assert "the step last builds on train, which is not finished" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        pipelines(["run", pipeline, "--step", "lst"])
    assert "there is no step lst; did you mean last?" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        pipelines(["submit", pipeline])
    assert "submit from the root of one, as sbatch itself" in capsys.readouterr().err
