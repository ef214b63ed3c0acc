"""Chains of commands in benchmarks end with a word on why, and the same call goes on."""

import sys
import time

import pytest

from benchmarks import project_commands
from benchmarks.project_commands import FailedCommandError, OutOfTimeError, ProjectCommands


@pytest.fixture
def ends_with(monkeypatch, tmp_path):
    """Have commands be a program that ends with an exit code."""

    def _ends_with(code: int) -> None:
        program = tmp_path / "program"
        program.write_text(f"#!{sys.executable}\nraise SystemExit({code})\n")
        program.chmod(0o755)
        monkeypatch.setattr(project_commands.sys, "executable", str(program))

    return _ends_with


def test_a_training_that_somebody_stops_is_told_from_minutes_that_are_over(ends_with):
    ends_with(75)
    with pytest.raises(
        OutOfTimeError, match="^the training was asked to stop, and has saved; the same command"
    ):
        ProjectCommands().run("train")
    with pytest.raises(OutOfTimeError, match="^the minutes are over; the same command goes on$"):
        ProjectCommands(deadline=time.monotonic()).run("train")


def test_a_command_that_fails_ends_the_chain_with_its_name(ends_with):
    ends_with(2)
    with pytest.raises(FailedCommandError, match="spikingbrain-evaluate ended with exit code 2"):
        ProjectCommands().run("evaluate", "--model", "nowhere")
