"""What the make targets run, without running it."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize("target", ["demo", "test", "test-fast", "lint", "typecheck", "format"])
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
