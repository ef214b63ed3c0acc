"""A command of the user's that is told what somebody should know who does not watch."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping

from spikingbrain_train.training.alert import Alert
from spikingbrain_train.training.callbacks.callback import Callback

_SECONDS = 60.0
"""For the commands that still run when a run ends."""


class AlertCommand(Callback):
    """Starts ``logging.alert_command`` for every alert, with title and text as its last two arguments.

    Also as ``ALERT_TITLE``, ``ALERT_TEXT``, ``ALERT_LEVEL`` and ``ALERT_OUTPUT_DIR`` in its environment. The
    run goes on meanwhile; a command that fails is said once.
    """

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []
        self._has_failed = False

    def alert(self, alert: Alert) -> None:
        command = self.run.config.logging.alert_command
        if command is None:
            return
        self._look_after()
        words = [*shlex.split(command), alert.title, alert.text]
        try:
            self._running.append(
                subprocess.Popen(
                    words,
                    env=os.environ | self._variables(alert),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for the run
                )
            )
        except OSError as error:
            self._say_failure(f"cannot be started ({error.strerror})")

    def step_begin(self) -> None:
        self._look_after()

    def end(self, error: BaseException | None) -> None:
        for command in self._running:
            try:
                command.wait(_SECONDS)
            except subprocess.TimeoutExpired:
                command.kill()
                command.wait()
        self._look_after()

    def _look_after(self) -> None:
        for command in [each for each in self._running if each.poll() is not None]:
            self._running.remove(command)
            if command.returncode != 0:
                self._say_failure(f"ended with code {command.returncode}")

    def _say_failure(self, how: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            self.run.say(
                f"warning: logging.alert_command={self.run.config.logging.alert_command} {how}; the run goes "
                "on without its alerts"
            )

    def _variables(self, alert: Alert) -> Mapping[str, str]:
        return {
            "ALERT_TITLE": alert.title,
            "ALERT_TEXT": alert.text,
            "ALERT_LEVEL": alert.level.value,
            "ALERT_OUTPUT_DIR": self.run.config.output_dir,
        }
