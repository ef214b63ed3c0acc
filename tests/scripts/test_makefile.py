"""What the make targets run, mostly without running it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def planned(*arguments: str) -> str:
    """The commands that make would run."""
    # Inside `make test` these would make this a sub-make with that call's options.
    environment = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    command = ["make", "--dry-run", "--no-print-directory", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_help_lists_every_target() -> None:
    make = ["make", "--no-print-directory", "help"]
    shown = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    targets = {line.split()[1] for line in (ROOT / "Makefile").read_text().splitlines() if ".PHONY" in line}
    assert {line.split()[1] for line in shown.splitlines()} == targets
    assert {"demo", "test", "lint", "typecheck"} <= targets


@pytest.mark.parametrize("target", ["demo", "test", "test-fast", "lint", "typecheck", "format", "docs"])
def test_target_makes_its_environment_first(target: str) -> None:
    first, *rest = planned(target, "VENV=elsewhere", "PYTHON=python3.12").splitlines()
    assert first == 'PYTHON="python3.12" scripts/setup_environment.sh "elsewhere"'
    assert rest and all("elsewhere/bin/" in line for line in rest)


def test_demo_takes_a_model_and_text_with_spaces_in_their_names() -> None:
    command = planned("demo", "MODEL=my models/qwen", "DATA=my text.jsonl", "OUTPUT=here").splitlines()[-1]
    assert command.endswith('tools/demo.py --output "here" --model "my models/qwen" --data "my text.jsonl"')
    assert "--model" not in planned("demo") and "--data" not in planned("demo")


def test_fast_tests_leave_out_the_slow_ones() -> None:
    assert '-m "not slow"' in planned("test-fast")
    assert "not slow" not in planned("test")


PROGRAM = """#!/usr/bin/env python3
import json, os, pathlib, sys
call = {"arguments": sys.argv[1:]}
call |= {name: os.environ.get(name) for name in ("PYTEST_ADDOPTS", "PYTHON")}
with open(pathlib.Path(__file__).parents[LEVEL] / "calls", "a") as file:
    file.write(json.dumps(call) + chr(10))
"""
HOSTILE = """x"; touch pwned; " `touch pwned` $(touch pwned) $(shell touch pwned) ' && touch pwned $HOME \\"""


def run_in_sandbox(folder: Path, *arguments: str) -> list[dict]:
    """Run make with programs that only write down how they were called."""
    shutil.copy(ROOT / "Makefile", folder)
    for name, level in (("scripts/setup_environment.sh", "1"), (".venv/bin/python", "2")):
        program = folder / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(PROGRAM.replace("LEVEL", level))
        program.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    done = subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (folder / "pwned").exists()
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def test_what_a_user_gives_to_the_demo_arrives_as_it_stands_and_is_never_run(tmp_path: Path) -> None:
    given = {"MODEL": HOSTILE, "DATA": HOSTILE + "d", "OUTPUT": HOSTILE + "o", "PYTHON": HOSTILE + "p"}
    setup, demo = run_in_sandbox(tmp_path, "demo", *(f"{name}={value}" for name, value in given.items()))
    assert setup["PYTHON"] == given["PYTHON"] and setup["arguments"] == [".venv"]
    arguments = [
        "tools/demo.py",
        "--output",
        given["OUTPUT"],
        "--model",
        given["MODEL"],
        "--data",
        given["DATA"],
    ]
    assert demo["arguments"] == arguments


@pytest.mark.parametrize("target", ["test", "test-fast"])
def test_arguments_of_pytest_are_words_and_never_run(tmp_path: Path, target: str) -> None:
    _, called = run_in_sandbox(tmp_path, target, "PYTEST_ARGS=tests/x.py -k 'a; touch pwned' $(touch pwned)")
    words = shlex.split(called["PYTEST_ADDOPTS"])
    assert words[-5:] == ["tests/x.py", "-k", "a; touch pwned", "$(touch", "pwned)"]
    assert called["arguments"] == ["-m", "pytest"]


def test_a_value_of_two_lines_is_refused(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    command = ["make", "demo", "MODEL=x\ntouch pwned"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "MODEL must be one line" in done.stderr
    assert not (tmp_path / "pwned").exists()
