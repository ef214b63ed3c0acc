"""What TAB offers: groups, choices, settings, flags and files, in the shell's own way."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spikingbrain_train.commands.completion import completion, suggested, suggestions
from spikingbrain_train.commands.completion_scripts import SCRIPTS
from spikingbrain_train.commands.parsers import PARSERS
from spikingbrain_train.commands.table import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("spikingbrain-train mod", ["model.", "model="]),
        ("spikingbrain-train model=tiny", ["model=tiny_76b", "model=tiny_hybrid"]),
        ("spikingbrain-train optimizer.adam_b", ["optimizer.adam_beta1=", "optimizer.adam_beta2="]),
        ("spikingbrain-train optimizer.lr=1e-4 dry_run=", ["dry_run=false", "dry_run=true"]),
        ("cd x && .venv/bin/spikingbrain-plan stage.di", ["stage.distillation."]),
        ("spikingbrain-plan --j", ["--json"]),
        ("spikingbrain-train --j", []),
        ("spikingbrain-train --nproc-per-node 2 precision=b", ["precision=bf16"]),
        ("spikingbrain-train 'data.train=[a, b]' output_d", ["output_dir="]),
        ("spikingbrain-train --cfg ", ["all", "hydra", "job"]),
        ("spikingbrain-train --n", ["--nnodes", "--node-rank", "--nproc-per-node"]),
        ("spikingbrain-convert ", ["average", "diff", "export", "import", "inspect", "reshard"]),
        ("spikingbrain-convert import --all", ["--allow-damaged-weights"]),
        ("spikingbrain-convert import --hf a --conversion b sliding", ["sliding_window="]),
        ("spikingbrain-evaluate --dtype f", ["float16", "float32"]),
        ("spikingbrain-evaluate --dtype=f", ["--dtype=float16", "--dtype=float32"]),
        ("spikingbrain-completion f", ["fish"]),
        ("spikingbrain-train nothing.here", []),
        ("spikingbrain-trian mod", []),
        ("spikingbrain-tra", []),
        ("", []),
    ],
)
def test_words_are_offered(line: str, found: list[str]) -> None:
    assert suggestions(line) == (found, False)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("spikingbrain-train checkpoint.load=", ["checkpoint.load=null"]),
        ("spikingbrain-train --config ", []),
        ("spikingbrain-preprocess --input ", []),
        (
            "spikingbrain-convert import --conversion spikingbrain_76",
            ["spikingbrain_76b", "spikingbrain_76b_exact"],
        ),
        ("spikingbrain-pipeline run de", ["demo"]),
        ("spikingbrain-plot a ", []),
    ],
)
def test_files_fit_too(line: str, found: list[str]) -> None:
    assert suggestions(line) == (found, True)


def test_variables_of_a_pipeline_are_offered() -> None:
    assert suggestions("spikingbrain-pipeline run demo bud") == (["budget="], False)


def test_every_command_but_a_run_has_a_parser() -> None:
    assert {command.name for command in COMMANDS} == {*PARSERS, "train", "plan"}


def test_bash_gets_what_follows_its_last_break() -> None:
    assert suggested("spikingbrain-train model=tiny_h", " =:") == ["-files", "tiny_hybrid"]
    assert suggested("spikingbrain-train model=tiny_h", " ") == ["-files", "model=tiny_hybrid"]


@pytest.mark.parametrize("shell", sorted(SCRIPTS))
def test_scripts_name_every_command_and_are_valid(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    completion([shell])
    script = capsys.readouterr().out
    assert all(command.program in script for command in COMMANDS) and "PROGRAMS" not in script
    if shutil.which(shell) is not None:
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_tab_in_a_real_bash(tmp_path: Path) -> None:
    for name in ("spikingbrain-train", "spikingbrain-completion"):
        program = tmp_path / name
        command = name.removeprefix("spikingbrain-")
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m spikingbrain_train {command} "$@"\n')
        program.chmod(0o755)
    (tmp_path / "my_checkpoint").mkdir()
    script = subprocess.run(
        [tmp_path / "spikingbrain-completion", "bash"], capture_output=True, text=True, check=True
    )
    (tmp_path / "rc").write_text(
        f"{script.stdout}\nPS1='$ '\nstty cols 400\ncd {tmp_path}\nbind 'set enable-bracketed-paste off'\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TERM": "dumb",
    }
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe("bash", ["bash", "--noprofile", "--rcfile", str(tmp_path / "rc"), "-i"], environment)
    said = ""

    def wait_for(text: str) -> None:
        nonlocal said
        deadline = time.monotonic() + 60
        while text not in said:
            assert time.monotonic() < deadline, said
            if select.select([terminal], [], [], 0.2)[0]:
                said += os.read(terminal, 4096).decode(errors="replace")

    try:
        wait_for("$ ")
        os.write(terminal, b"echo spikingbrain-train; spikingbrain-train model=tiny_h\t")
        wait_for("model=tiny_hybrid ")
        os.write(terminal, b"stage.micro\t1 checkpoint.load=my\t")
        wait_for("stage.micro_batch_size=1 checkpoint.load=my_checkpoint/")
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)
