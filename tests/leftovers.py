"""What tests leave running fails the run, by name, and cannot keep pytest from ending.

The interpreter waits for its threads and for the processes of `multiprocessing` when it stops, and whoever
reads the output waits for every process that holds it: a run that has printed "passed" can hang for ever.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import threading
import time
from typing import Any

import psutil
import pytest

EXIT_SECONDS = 60
"""How long the interpreter may take to stop."""
_GRACE_SECONDS = 5.0
# Services that libraries start once and end themselves with their process.
_SERVICES = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "wandb-core")
_LEFT = pytest.StashKey[list[str]]()
_WORKERS_LEFT = "left"


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    left = config.stash.setdefault(_LEFT, [])
    if not config.pluginmanager.hasplugin("dsession"):  # the children of such a process are workers
        left += _end_what_is_left()
    if left and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if _is_worker(config):
        config.workeroutput[_WORKERS_LEFT] = left


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """pytest-xdist calls it in the process that has the terminal, when a worker has ended."""
    node.config.stash.setdefault(_LEFT, []).extend(getattr(node, "workeroutput", {}).get(_WORKERS_LEFT, []))


def pytest_unconfigure(config: pytest.Config) -> None:
    if config.stash.get(_LEFT, []) or not _is_worker(config):  # a worker waits for the others
        faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True, file=_terminal(config))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left := config.stash.get(_LEFT, []):
        terminalreporter.section("left running by the tests: end it where it was started", red=True)
        for line in left:
            terminalreporter.line(line)


def _is_worker(config: pytest.Config) -> bool:
    """Whether this is a process of pytest-xdist that runs tests for the one with the terminal."""
    return hasattr(config, "workeroutput")


def _end_what_is_left() -> list[str]:
    """Kill processes that this one started. Returns what they and its threads are."""
    gc.collect()  # what only a reference cycle keeps is not left over
    end = time.monotonic() + _GRACE_SECONDS
    processes = [process for process in _children() if not _is_service(process)]
    _, processes = psutil.wait_procs(processes, timeout=_GRACE_SECONDS)
    threads = [thread for thread in threading.enumerate() if _holds_up_the_end(thread)]
    for thread in threads:  # those of a pool that was collected above have just been told to end
        thread.join(max(end - time.monotonic(), 0.0))
    threads = [thread for thread in threads if thread.is_alive()]
    left = [f"thread {thread.name!r}" for thread in threads]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.append(f"process {process.pid}: {' '.join(process.cmdline())}")
            process.kill()
    return left


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _is_service(process: psutil.Process) -> bool:
    """Whether a library started it for as long as its parent lives, or it is about to be collected."""
    try:
        command = " ".join(process.cmdline())
        return process.status() == psutil.STATUS_ZOMBIE or any(name in command for name in _SERVICES)
    except psutil.NoSuchProcess:
        return True


def _holds_up_the_end(thread: threading.Thread) -> bool:
    return not thread.daemon and thread is not threading.main_thread()


def _terminal(config: pytest.Config) -> int:
    """The error output itself, not the file that pytest captures it in."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        return os.dup(2)
