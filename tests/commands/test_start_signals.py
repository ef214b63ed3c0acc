"""Signals that come before a command can take them."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from spikingbrain_train.commands.start_signals import hold_back
from spikingbrain_train.commands.table import COMMANDS, Command
from tests.commands.terminal import ENVIRONMENT, TRAIN


@pytest.mark.parametrize(
    ("number", "ends_with"), [(signal.SIGINT, 128 + signal.SIGINT), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_a_rank_takes_what_came_before_its_interpreter_stood(number: signal.Signals, ends_with: int) -> None:
    ranks: list[subprocess.Popen[str]] = []

    def agent() -> None:
        hold_back()
        started = subprocess.Popen([*TRAIN, "--help"], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        started.send_signal(number)
        ranks.append(started)

    thread = threading.Thread(target=agent)
    thread.start()
    thread.join()
    _, said = ranks[0].communicate(timeout=60)
    assert (ranks[0].returncode, said) == (ends_with, "")


SCRIPT = """
import os, signal
from spikingbrain_train.commands.start_signals import program
from spikingbrain_train.config.command_line import user_errors

def interrupted():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        print("goes on")
    except BaseException as error:  # as a library may
        print(f"met {type(error).__name__}")
        raise

@program
def command():
    {body}

command()
"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("interrupted()", ""),
        ("with user_errors(same_on_all_ranks=True): interrupted()", ""),
        ("with user_errors(): interrupted()", "met KeyboardInterrupt"),
        ("signal.signal(signal.SIGINT, lambda *_: os._exit(130))\n    with user_errors(): interrupted()", ""),
    ],
)
def test_ctrl_c_is_an_exception_only_once_the_work_has_begun(body: str, said: str) -> None:
    """Among imports and checks of settings a library may turn an exception into another, or lose it."""
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("{body}", body)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout.strip(), ended.stderr) == (128 + signal.SIGINT, said, "")


def test_a_command_in_the_background_stays_deaf_to_ctrl_c() -> None:
    body = "with user_errors(): interrupted()"
    script = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + SCRIPT.replace("{body}", body)
    ended = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.strip()) == (0, "goes on")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_takes_them(command: Command) -> None:
    assert hasattr(command.run, "__wrapped__")
