"""Pipelines whose every command is forked from one process that has imported what is slow.

The small pipeline has seventeen steps, each a program that imports torch, megatron-core or transformers for
five seconds. Here the pipeline is a fork in a process group of its own, its commands are forks in the same
group, and a kill of the group leaves files as they were at that moment.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from tests.docs.programs import IMPORTED, become  # noqa: E402

_OWN = ("spikingbrain_train.pipelines.command_line", "spikingbrain_train.pipelines.demo.kinds")
LOG = ".said0"
"""What the pipeline and its commands have printed, in the folder in which it runs."""


class ForkedPipelines:
    """The process that forks them; a context manager."""

    def __enter__(self) -> ForkedPipelines:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the end of its input ends it

    def run(self, arguments: Sequence[str], folder: Path, kill_at: tuple[str, float] | None = None) -> int:
        """``spikingbrain-pipeline run <arguments>`` in ``folder``.

        Args:
            arguments: of the command.
            folder: where.
            kill_at: SIGKILL all of it so many seconds after the pipeline has printed that text.

        Returns:
            Its exit code, -9 where it was killed.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        job = {"arguments": list(arguments), "folder": str(folder), "kill_at": kill_at}
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


def _serve() -> None:
    import torch

    for module in (*IMPORTED, *_OWN):
        importlib.import_module(module)
    torch.set_num_threads(1)
    gc.freeze()  # else each fork copies what is imported when it collects garbage
    for line in sys.stdin:
        job = json.loads(line)
        folder = Path(job["folder"])
        (folder / LOG).unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            _run_pipeline(job["arguments"], folder)
        print(_wait(child, folder / LOG, job["kill_at"]), flush=True)


def _wait(child: int, log: Path, kill_at: tuple[str, float] | None) -> int:
    deadline = None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG if kill_at is not None else 0)
        if ended:
            return os.waitstatus_to_exitcode(status)
        assert kill_at is not None
        text, delay = kill_at
        if deadline is None and log.exists() and text in log.read_text(errors="replace"):
            deadline = time.monotonic() + delay
        if deadline is not None and time.monotonic() >= deadline:
            os.killpg(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.002)


def _run_pipeline(arguments: list[str], folder: Path) -> None:
    from spikingbrain_train.pipelines import runner

    def call(command: Sequence[str], begun: Callable[[int], None]) -> tuple[int, None]:
        signal.alarm(0)  # of all steps together; each command has its own
        child = os.fork()
        if child == 0:
            words = list(command[1:])
            if command[0] != sys.executable:
                words = ["-m", "spikingbrain_train", command[0].removeprefix("spikingbrain-"), *words]
            _end_as(words, Path.cwd(), 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), None

    runner.call = call  # type: ignore[assignment]
    _end_as(["-m", "spikingbrain_train", "pipeline", "run", *arguments], folder, 0)


def _end_as(words: list[str], folder: Path, rank: int) -> None:
    """Be the program, and end this process as it does."""
    code: object = 0
    try:
        become(words, folder, rank, {})
    except SystemExit as ended:
        code = ended.code
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    _serve()
