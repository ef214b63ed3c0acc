"""Runs steps once: a second run skips what is finished, and an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from spikingbrain_train.config.command_line import DIVERGED, START_AGAIN, USER_ERROR
from spikingbrain_train.errors import ConfigurationError, SpikingBrainError
from spikingbrain_train.pipelines.demo.steps import Step, step_keys
from spikingbrain_train.reporting.activity import format_duration
from spikingbrain_train.storage.durable_files import write_text_durably

STATE_FILE = "demo_state.json"


@dataclass
class StepRecord:
    """What is remembered of a step."""

    key: str
    """Digest of the command and everything before it; another one makes the result stale."""
    seconds: float = 0.0
    """Wall time, over all attempts."""


class Runner:
    """Runs the demo's steps in ``output`` and remembers which are finished.

    Raises:
        ConfigurationError: ``output`` holds files that the demo did not make.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output / STATE_FILE
        if output.exists() and not output.is_dir():
            raise ConfigurationError(f"--output {output} is a file; choose a folder")
        if output.is_dir() and any(output.iterdir()) and not self.path.is_file():
            raise ConfigurationError(
                f"--output {output} is not empty and was not made by the demo; choose another folder"
            )
        self.records: dict[str, StepRecord] = {}
        if self.path.is_file():
            try:
                stored = json.loads(self.path.read_text(encoding="utf-8"))
                self.records = {name: StepRecord(**record) for name, record in stored.items()}
            except (ValueError, TypeError, AttributeError):
                raise ConfigurationError(
                    f"{self.path} is damaged; remove {output} or choose another --output"
                ) from None

    def forget(self) -> None:
        """Start over: nothing counts as finished any more."""
        self.records = {}

    def run(self, steps: Sequence[Step], through: str | None = None) -> None:
        """Run what is not finished yet.

        Args:
            steps: all steps of the demo.
            through: name of the last one to run; None runs all.

        Raises:
            SpikingBrainError: a command failed.
            SystemExit: a command failed and has said what the user can do.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        for number, (step, key) in enumerate(zip(steps, step_keys(steps), strict=True), start=1):
            heading = f"[{number}/{len(steps)}] {step.title}"
            record = self.records.get(step.name)
            ours = record is not None and record.key == key
            if record is not None and ours and step.is_complete():
                print(f"{heading}: done ({format_duration(record.seconds)})", flush=True)
                if step.name == through:
                    return
                continue
            # An interrupted training goes on from its own checkpoints; everything else starts again.
            if record is None or not ours or step.train_iters is None:
                _remove(step.makes)
                record = self.records[step.name] = StepRecord(key)
            print(f"\n{heading}\n  {printable(step.command)}\n", flush=True)
            self._run(step, record)
            if step.name == through:
                return

    def seconds(self, steps: Sequence[Step], through: str) -> float:
        """Wall time that the finished steps up to ``through`` have taken."""
        names = [step.name for step in steps]
        done = names[: names.index(through) + 1]
        return sum(self.records[name].seconds for name in done if name in self.records)

    def _run(self, step: Step, record: StepRecord) -> None:
        started, before = time.monotonic(), record.seconds
        # Before the command too, so that what an interrupted one leaves is known as ours.
        self._save()
        try:
            code = _call(step.command)
        finally:
            record.seconds = before + time.monotonic() - started
            self._save()
        if code == 0 and step.is_complete():
            return
        if code in (USER_ERROR, DIVERGED, START_AGAIN):  # the command has printed its sentence
            print("Finished steps are kept: the same command goes on from here.", file=sys.stderr)
            raise SystemExit(code)
        if code == 0:
            outcome = "left no complete result"
        elif code == -signal.SIGKILL:
            outcome = "was killed, as the system does when memory runs out"
        else:
            outcome = f"failed with exit code {code}"
        raise SpikingBrainError(
            f"the step {step.name!r} {outcome}, see above; finished steps are kept, and the same command "
            "goes on from here"
        )

    def _save(self) -> None:
        stored = {name: asdict(record) for name, record in self.records.items()}
        write_text_durably(self.path, json.dumps(stored, indent=2) + "\n")


def _call(command: Sequence[str]) -> int:
    """Run a command to its end and return its exit code. Ctrl-C reaches the command, too, which may have
    something to save first; a second one ends it.

    Raises:
        KeyboardInterrupt: there was one, and the command has not saved to go on later.
    """
    interrupted = False
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        while process.returncode is None:
            try:
                process.wait()
            except KeyboardInterrupt:
                interrupted = True
    if interrupted and process.returncode != START_AGAIN:
        raise KeyboardInterrupt
    return process.returncode


def printable(command: Sequence[str]) -> str:
    """The command as it can be pasted into a shell in the current folder."""
    here = Path.cwd()
    words = []
    for word in command:
        path = Path(word)
        # Not resolved: .venv/bin/python is a link to an interpreter without our packages.
        words.append(
            str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else word
        )
    return shlex.join(words)


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
