"""Commands of this project as a user would type them, for benchmarks that run chains of them in pieces."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
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


def add_piece_options(flags: argparse.ArgumentParser) -> None:
    """``--minutes`` and ``--report``, of a benchmark that runs in pieces."""
    flags.add_argument("--minutes", type=float, help="stop after that many; the next call goes on")
    flags.add_argument("--report", action="store_true", help="run nothing")


def one_sequence_a_step(steps: int, seq_length: int, rate: float, warmup: int, data: Path) -> tuple[str, ...]:
    """Settings of a short training on a CPU that saves once, at its end.

    Args:
        steps: of it.
        seq_length: tokens of a step.
        rate: the learning rate, which falls to a tenth.
        warmup: steps until it is reached.
        data: prefix of the text to train on.
    """
    return (
        "cluster=cpu",
        "checkpoint.keep_last=1",
        f"checkpoint.save_interval={steps}",
        f"stage.train_iters={steps}",
        f"stage.seq_length={seq_length}",
        "stage.micro_batch_size=1",
        "stage.global_batch_size=1",
        f"optimizer.lr={rate}",
        f"optimizer.min_lr={rate / 10}",
        f"optimizer.lr_warmup_iters={warmup}",
        "optimizer.weight_decay=0",
        f"data.train=[{data}]",
        "logging.tensorboard=false",
        "logging.log_interval=1",
    )


class ProjectCommands:
    """Runs commands until the time is over.

    Args:
        deadline: ``time.monotonic()`` at which to stop; None goes on to the end.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline

    @classmethod
    def within(cls, minutes: float | None) -> ProjectCommands:
        """For so many minutes from now on; None goes on to the end."""
        return cls(None if minutes is None else time.monotonic() + 60 * minutes)

    def tokenize(self, folder: Path, names: Iterable[str], tokenizer: Path) -> None:
        """Make a dataset of every text ``folder/name.jsonl`` that has none yet, beside it."""
        for name in names:
            if not (folder / f"{name}.idx").is_file():
                words = ("preprocess", "--input", folder / f"{name}.jsonl", "--tokenizer", tokenizer)
                self.run(*words, "--output-prefix", folder / name)

    def import_dense(self, model: Path, output: Path) -> None:
        """Make a checkpoint of a dense Hugging Face folder, unless it is there."""
        if not output.is_dir():
            self.run("convert", "import", "--hf", model, "--output", output)

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
