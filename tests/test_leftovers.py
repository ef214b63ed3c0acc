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

leftovers._GRACE_SECONDS = 0.2
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
    (tmp_path / "conftest.py").write_text(_CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(f"def test_it():\n        pass\n{_TESTS[what]}")
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(root),
            "PYTEST_ADDOPTS": "",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    output = run.stdout + run.stderr
    assert "1 passed" in output and run.returncode == code, output
    before, _, after = found.partition("%d")
    assert before in output and after in output
    assert ("left running by the tests" in output) is (what in ("process", "deaf daemon", "thread")), output
