"""A test that leaves something running fails its run, which ends all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_CONFTEST = """
from tests import leftovers
from tests.leftovers import pytest_sessionfinish, pytest_terminal_summary
from tests.leftovers import pytest_testnodedown, pytest_unconfigure

leftovers._GRACE_SECONDS = {grace}
leftovers.EXIT_SECONDS = 5
"""
_TESTS = {
    "process": """
        import subprocess
        subprocess.Popen(["sleep", "600"])
    """,
    # As a loader did once: the interpreter asks it to end, it does not hear it, and is waited for.
    "deaf daemon": """
        import multiprocessing, signal, time
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True).start()
    """,
    "thread": """
        import threading, time
        threading.Thread(target=time.sleep, args=(600,), name="sleeper").start()
    """,
    "end": """
        import atexit, time
        def never_returns(): time.sleep(600)
        atexit.register(never_returns)
    """,
    "nothing": "",
}


@pytest.mark.parametrize(
    ("what", "code", "found"),
    [
        ("process", 1, "process %d: sleep 600"),
        ("deaf daemon", 1, "process %d: "),
        ("thread", 1, "thread 'sleeper'"),
        ("end", 1, "in never_returns"),
        ("nothing", 0, ""),
    ],
)
def test_what_is_left_running_is_named_and_ended(tmp_path: Path, what: str, code: int, found: str) -> None:
    output, code_found = _run(tmp_path, _TESTS[what])
    assert "1 passed" in output and code_found == code, output
    before, _, after = found.partition("%d")
    assert before in output and after in output
    assert ("left running by the tests" in output) is (what in ("process", "deaf daemon", "thread")), output


@pytest.mark.parametrize("what", ["process", "thread", "nothing"])
def test_what_a_worker_leaves_running_is_named_by_the_process_that_has_the_terminal(
    tmp_path: Path, what: str
) -> None:
    pytest.importorskip("xdist")
    output, code = _run(tmp_path, _TESTS[what], "-p", "xdist.plugin", "-n", "1")
    assert "1 passed" in output and code == (what != "nothing"), output
    assert ("left running by the tests" in output) is (what != "nothing"), output
    assert {"process": "sleep 600", "thread": "thread 'sleeper'", "nothing": ""}[what] in output, output


def test_a_thread_of_a_pool_that_has_just_been_told_to_end_is_not_left_over(tmp_path: Path) -> None:
    output, code = _run(
        tmp_path,
        """
        import time
        from concurrent.futures import ThreadPoolExecutor
        pool = ThreadPoolExecutor(1)
        pool.submit(time.sleep, 2)
        pool.shutdown(wait=False)
        """,
        grace=30,
    )
    assert "1 passed" in output and code == 0, output


def _run(folder: Path, test: str, *options: str, grace: float = 0.2) -> tuple[str, int]:
    """What pytest prints about one test, and its exit code."""
    (folder / "conftest.py").write_text(_CONFTEST.format(grace=grace))
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_it.py").write_text(f"def test_it():\n        pass\n{test}")
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(root), *sys.path]),
            "PYTEST_ADDOPTS": "",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    return run.stdout + run.stderr, run.returncode
