"""Commands of this project as a user would type them, for benchmarks that run chains of them in pieces."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from spikingbrain_train.errors import SpikingBrainError

ROOT = Path(__file__).resolve().parents[1]
_ASKED_TO_STOP = 75
"""Exit code of a training that has saved because it was asked to stop."""


class OutOfTimeError(Exception):
    """The minutes of this call are over, or somebody has stopped it; the next call goes on."""

    def __init__(self, why: str = "the minutes are over") -> None:
        super().__init__(f"{why}; the same command goes on")


class FailedCommandError(SpikingBrainError):
    """A command of a chain did not end well."""


class ProjectCommands:
    """Runs commands until the time is over.

    Args:
        deadline: ``time.monotonic()`` at which to stop; None goes on to the end.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline

    def run(self, *words: object) -> None:
        """Run a command of this project; ask it to stop when the time is over.

        Args:
            words: its name as in ``python -m spikingbrain_train NAME``, and its arguments.

        Raises:
            OutOfTimeError: go on with another call.
            FailedCommandError: it ended with another exit code than 0.
        """
        left = None if self.deadline is None else self.deadline - time.monotonic()
        if left is not None and left <= 0:
            raise OutOfTimeError
        command = [sys.executable, "-m", "spikingbrain_train", *(str(word) for word in words)]
        print(
            "$", " ".join(["spikingbrain-" + str(words[0]), *(str(word) for word in words[1:])]), flush=True
        )
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise OutOfTimeError from None
        except BaseException:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
        if code == _ASKED_TO_STOP:
            raise OutOfTimeError("the training was asked to stop, and has saved")
        if code:
            raise FailedCommandError(
                f"spikingbrain-{words[0]} ended with exit code {code}; see what it says above"
            )
