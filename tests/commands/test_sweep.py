"""``--multirun``: a process a job, all checked before the first one starts, then a summary of their ends."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from spikingbrain_train.commands import sweep as module
from spikingbrain_train.commands.programs import plan, train
from spikingbrain_train.commands.sweep_jobs import expand, folder_name
from spikingbrain_train.config.command_line import START_AGAIN
from spikingbrain_train.errors import ConfigurationError
from tests.commands.terminal import TRAIN, Terminal, settings

LR = "optimizer.lr=1e-4,2e-4"


def test_every_combination_is_a_job_and_lists_are_values() -> None:
    jobs = expand(["stage=cpt", LR, "data.train=[a,b]", "seed=range(1,3)"])
    assert [varied for varied, _ in jobs] == [
        (f"optimizer.lr={lr}", f"seed={seed}") for lr in ("0.0001", "0.0002") for seed in (1, 2)
    ]
    assert jobs[1][1] == ("stage=cpt", "optimizer.lr=0.0001", "data.train=[a,b]", "seed=2")


def test_choices_of_a_group_are_found_by_a_pattern_and_flags_stay() -> None:
    jobs = expand(["--config", "a,b.yaml", "model=glob(tiny*)"])
    assert [words for _, words in jobs] == [
        ("--config", "a,b.yaml", f"model={name}") for name in ("tiny_76b", "tiny_hybrid")
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["seed=1"], "varies nothing"),
        (["optimizer.lr=interval(0,1)"], "no end of values"),
        (["seed=[1,2"], "cannot be read"),
    ],
)
def test_what_is_no_sweep_is_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        expand(words)


def test_folders_say_what_varies_in_letters_that_mean_nothing_to_hydra() -> None:
    keys = ["optimizer.lr", "data.train"]
    assert folder_name(["optimizer.lr=0.0001", "data.train=[a/b,c]"], keys) == "lr_0.0001__train_a_b_c"
    assert folder_name(["a.x=1", "b.x=2"], ["a.x", "b.x"]) == "a.x_1__b.x_2"
    long = folder_name([f"data.train={'x' * 300}"], ["data.train"])
    assert len(long) < 140 and long != folder_name([f"data.train={'x' * 301}"], ["data.train"])


class Calls:
    """Stands for the jobs: remembers them, and ends each as it is told."""

    def __init__(self, *ends: tuple[int, signal.Signals | None]) -> None:
        self.ends = list(ends)
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str]) -> tuple[int, signal.Signals | None]:
        self.commands.append(list(command))
        return self.ends[len(self.commands) - 1] if self.ends else (0, None)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Runs a command line in this process; returns its exit code."""

    def started(calls: Calls, *words: str, program=train) -> int:
        monkeypatch.setattr(module, "call", calls)
        monkeypatch.setattr(sys, "argv", ["spikingbrain-train", *words])
        try:
            program()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return started


def test_jobs_run_one_after_the_other_each_in_its_folder(run, tmp_path: Path, capsys) -> None:
    calls = Calls()
    words = [*settings(tmp_path), LR, "seed=1,2"]
    assert run(calls, "--multirun", "--nproc-per-node", "2", *words) == 0
    folders = [f"{tmp_path}/run/lr_{lr}__seed_{seed}" for lr in ("0.0001", "0.0002") for seed in (1, 2)]
    assert [command[-1] for command in calls.commands] == [f"output_dir={folder}" for folder in folders]
    start = [sys.executable, "-m", "spikingbrain_train", "train", "--nproc-per-node=2", "model=tiny_hybrid"]
    assert all(command[:6] == start for command in calls.commands)
    said = capsys.readouterr().out
    assert "[4/4] optimizer.lr=0.0002 seed=2" in said and "4 of 4 jobs are done" in said
    assert f"spikingbrain-plot --compare {' '.join(folders)}" in said


def test_a_job_that_fails_leaves_the_others_their_turn(run, tmp_path: Path, capsys) -> None:
    calls = Calls((0, None), (3, None), (-9, None))
    assert run(calls, "-m", *settings(tmp_path), "seed=1,2,3") == 3
    assert len(calls.commands) == 3
    lines = capsys.readouterr().out.splitlines()
    assert "1 of 3 jobs are done" in lines
    assert [line[:12].strip() for line in lines[-3:]] == ["done", "failed (3)", "failed (137)"]


@pytest.mark.parametrize(
    ("end", "code", "sentence"),
    [
        ((START_AGAIN, signal.SIGINT), 130, "interrupted: the sweep ends here"),
        ((START_AGAIN, signal.SIGTERM), START_AGAIN, "a job was asked to stop"),
        ((START_AGAIN, None), START_AGAIN, "a job was asked to stop"),
    ],
)
def test_a_request_to_stop_ends_the_sweep(run, tmp_path: Path, capsys, end, code: int, sentence: str) -> None:
    calls = Calls((0, None), end)
    assert run(calls, "-m", *settings(tmp_path), "seed=1,2,3") == code
    said = capsys.readouterr()
    assert len(calls.commands) == 2 and sentence in said.err and "not started" in said.out


@pytest.mark.parametrize("program", [train, plan])
def test_a_dry_run_lists_the_jobs(run, tmp_path: Path, capsys, program) -> None:
    calls = Calls()
    words = [*settings(tmp_path), LR] + (["dry_run=true"] if program is train else [])
    assert run(calls, "-m", *words, program=program) == 0
    said = capsys.readouterr().out
    assert "# [1/2] optimizer.lr=0.0001" in said and f"output_dir={tmp_path}/run/lr_0.0002" in said
    assert not calls.commands and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["optimizer.lr=1e-4,fast"], "job 2 of 2 (optimizer.lr=fast): optimizer.lr=fast does not fit"),
        (["parallel=single,pp2"], "job 2 of 2 (parallel=pp2): the world size 1 is not divisible"),
        (["seed=1,1"], "2 jobs would write into"),
        (["seed=1,2", "--cfg", "job"], "--cfg shows one run"),
        (["seed=1,2", "--submit", "sbatch"], "--submit takes what submits one run"),
        (["seed=1,2", "--submit", "nowhere_sbatch run.sbatch"], "nowhere_sbatch, which is not installed"),
        (
            ["seed=1,2", "--submit=sbatch x", "--nproc-per-node=2"],
            "--nproc-per-node does not go with --submit",
        ),
        (["seed=1,2", "output_dir=???"], "output_dir is missing"),
        (
            ["seed=1,2", "callbacks=[no.such]"],
            "job 1 of 2 (seed=1): callbacks names no.such, which cannot be",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_any_job_starts(
    run, tmp_path: Path, capsys, words: list[str], sentence: str
) -> None:
    calls = Calls()
    assert run(calls, "-m", *settings(tmp_path), *words) == 2
    said = capsys.readouterr().err
    assert not calls.commands and sentence in said and said.count("\n") == 1


def test_a_rank_of_a_launcher_starts_no_sweep(run, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert run(Calls(), "-m", *settings(tmp_path), "seed=1,2") == 2
    assert "spikingbrain-train --multirun --nproc-per-node N ..." in capsys.readouterr().err


def test_a_submitted_sweep_is_an_array_with_a_file_of_arguments_a_task(
    run, tmp_path: Path, monkeypatch, capsys
) -> None:
    program = tmp_path / "sbatch"
    write = f"json.dump(sys.argv[1:], open({str(tmp_path / 'called')!r}, 'w'))"
    program.write_text(f"#!{sys.executable}\nimport json, sys\n{write}\n")
    program.chmod(0o755)
    words = ["-m", *settings(tmp_path), "parallel=tp2", LR, "--submit", f"{program} --nodes=4 run.sbatch"]
    assert run(Calls(), *words, "dry_run=true") == 0
    assert not (tmp_path / "run").exists() and "--array=0-1" in capsys.readouterr().out
    assert run(Calls(), *words) == 0
    folder = tmp_path / "run" / "sweep"
    called = json.loads((tmp_path / "called").read_text())
    assert called == ["--array=0-1", f"--export=ALL,SWEEP_ARGUMENTS={folder}", "--nodes=4", "run.sbatch"]
    arguments = [(folder / f"{task}.args").read_text().splitlines() for task in (0, 1)]
    assert (
        arguments[1][-1] == f"output_dir={tmp_path}/run/lr_0.0002" and "optimizer.lr=0.0002" in arguments[1]
    )


@pytest.mark.slow
def test_ctrl_c_ends_the_sweep_with_a_sentence_and_the_job_has_saved(tmp_path: Path) -> None:
    terminal = Terminal(*TRAIN, "-m", *settings(tmp_path), "seed=1,2")
    terminal.wait_for_steps(tmp_path / "run" / "seed_1")
    terminal.press_ctrl_c()
    assert terminal.exit_code() == 130, terminal.said
    assert "Traceback" not in terminal.said and "SIGINT: stopped at iteration" in terminal.said
    assert terminal.said.strip().splitlines()[-1].startswith("interrupted: the sweep ends here")
    assert not (tmp_path / "run" / "seed_2").exists()
