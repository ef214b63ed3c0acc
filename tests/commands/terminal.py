"""Commands in the foreground of a terminal, as a user starts them."""

from __future__ import annotations

import os
import pty
import select
import sys
import time
from pathlib import Path

import psutil

from spikingbrain_train.reporting.metrics import METRICS_FILE
from tests.config.small_dataset import write_dataset

ROOT = Path(__file__).resolve().parents[2]
TRAIN = [sys.executable, "-m", "spikingbrain_train", "train"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def settings(folder: Path) -> list[str]:
    """A tiny run that takes hours, in ``folder``/run."""
    text = write_dataset(folder / "text", 200)
    return [
        *("model=tiny_hybrid", "model.vocab_size=512", "cluster=cpu", "precision=fp32", "parallel=single"),
        *(f"data.train=[{text}]", "stage.seq_length=64", "stage.global_batch_size=2"),
        *(f"output_dir={folder / 'run'}", "stage.train_iters=100000", "logging.log_interval=1"),
        *("logging.tensorboard=false", "cluster.peak_tflops=1"),
    ]


class Terminal:
    """A command in the foreground of a terminal, as a user starts it."""

    def __init__(self, *command: str) -> None:
        self.said = ""
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], command, ENVIRONMENT)

    def read(self, seconds: float) -> bool:
        """Take what is said; False once the command has ended."""
        if not select.select([self._terminal], [], [], seconds)[0]:
            return True
        try:
            part = os.read(self._terminal, 1 << 16)
        except OSError:
            return False
        self.said += part.decode(errors="replace").replace("\r\n", "\n")
        return bool(part)

    def wait_for_steps(self, run: Path) -> None:
        """Until some steps are done."""
        deadline = time.monotonic() + 200
        while not (run / METRICS_FILE).exists() or (run / METRICS_FILE).read_text().count("train/loss") < 3:
            assert self.read(0.1) and time.monotonic() < deadline, self.said

    def press_ctrl_c(self) -> None:
        """The terminal sends SIGINT to everything in its foreground."""
        os.write(self._terminal, b"\x03")

    def exit_code(self) -> int:
        """Wait for the end."""
        deadline = time.monotonic() + 120
        try:
            while self.read(0.5):
                assert time.monotonic() < deadline, self.said
        finally:
            if time.monotonic() >= deadline:
                for process in [*psutil.Process(self.pid).children(recursive=True), psutil.Process(self.pid)]:
                    process.kill()
            _, status = os.waitpid(self.pid, 0)
            os.close(self._terminal)
        return os.waitstatus_to_exitcode(status)
