"""torchrun, its ranks and single runs, forked from the process that has imported what is slow (pool.py).

The agent is torchrun's own, with its rendezvous, restarts and signals, and every rank is a process that
``train.py`` begins in; only the start of an interpreter and its imports are left out. Real starts are those
of tests/distributed/test_stop_signals.py, tests/commands/test_ranks.py and tests/slurm.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from tests.distributed.interrupted_runs import Launch
from tests.distributed.pool import PRELOADED


class ForkedLaunch(Launch):
    """A :class:`Launch` whose processes are forks."""

    def _start(self, words: Sequence[str], variables: Mapping[str, str]) -> Any:
        self._ranks = self.log.with_name(f"{self.log.name}.ranks")
        self._ranks.mkdir()
        return Fork(_launch, [*words], dict(variables), self.log, self._ranks)

    def pids(self) -> dict[int, int]:
        found = {}
        for file in sorted(self._ranks.iterdir(), key=lambda file: file.stat().st_mtime_ns):
            if _lives(int(file.name)):
                found[int(file.read_text())] = int(file.name)
        return found


def start_alone(words: Sequence[str], variables: Mapping[str, str], log: Path) -> Fork:
    """``python <words>`` without a launcher; what it says is added to a file."""
    log.touch()
    return Fork(_alone, [*words], dict(variables), log)


class Fork:
    """A process of the fork server with the methods of ``subprocess.Popen``."""

    def __init__(self, target: Any, *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED])
        self._process = context.Process(target=target, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a fork", timeout or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def _lives(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _launch(words: list[str], variables: dict[str, str], log: Path, ranks: Path) -> None:
    """Be torchrun."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import (
        SubprocessHandler,
    )

    _begin(variables, log)
    # This process has been forked by a fork server, and would start one of its own for ranks.
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]

    def forked(_: SubprocessHandler, command: tuple[str, ...], environment: dict[str, str]) -> Any:
        script = command.index(next(word for word in command if word.endswith(".py")))
        return Fork(_rank, list(command[script:]), environment, log, ranks)

    SubprocessHandler._popen = forked
    sys.argv = ["torchrun", *words]
    _end_as(lambda: importlib.import_module("torch.distributed.run").main(words))


def _rank(words: list[str], variables: dict[str, str], log: Path, ranks: Path) -> None:
    """Be a rank."""
    _begin(variables, log)
    _show("RANK", "MASTER_PORT")
    written = ranks / f".{os.getpid()}"
    written.write_text(variables["RANK"])
    written.rename(ranks / str(os.getpid()))
    _become(words)


def _alone(words: list[str], variables: dict[str, str], log: Path) -> None:
    """Be a process without others."""
    _begin(variables, log)
    _become(words)


def _become(words: list[str]) -> None:
    """Be the script."""
    import torch

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as where a program begins; loaders ask
    sys.argv = list(words)
    _end_as(lambda: runpy.run_path(words[0], run_name="__main__"))


def _begin(variables: dict[str, str], log: Path) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ.clear()
    os.environ.update(variables)


def _show(*names: str) -> None:
    """Let /proc have these variables of this process, by which its peers know it: a fork's are older ones."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    text = b"".join(f"{name}={os.environ[name]}".encode() + b"\0" for name in names)
    assert len(text) <= end - start, "the fork server has had no environment"
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, len(text))


def _end_as(program: Any) -> None:
    """Run it and what it has registered for its end, which a fork does not."""
    try:
        program()
    finally:
        with suppress(Exception):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
