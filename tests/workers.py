"""How the whole suite is spread over processes: pytest-xdist's, which `make test` asks for with `-n auto`.

A worker takes whole files, so that what a file prepares is prepared once. Long files come first: begun last,
one of them would keep a core busy while the others have nothing left to do. There are more workers than
cores: ranks of small models wait for each other, and tests wait for Slurm and for launchers.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections import Counter
from typing import Any

import pytest

from spikingbrain_train.planning.launch import available_cores, memory_limit

MOST_WORKERS = 8
"""Of more, most would wait for the longest file."""
MEMORY_OF_A_WORKER = 3 * 2**30
"""Bytes of a process with torch and megatron-core and of the ranks that it starts."""
_TESTS = {"slow": 100, "ranks": 20}
"""Mark or fixture -> how many tests without either take as long."""


def pytest_configure(config: pytest.Config) -> None:
    """Let a worker have the width that a file has, as pytest's own process: xdist gives it 80 columns."""
    if hasattr(config, "workerinput"):
        os.environ.pop("COLUMNS", None)
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):  # it collects tests
        gc.disable()  # what is imported and collected is no garbage; looking for some takes a fifth of it
    folder = os.environ["HF_MODULES_CACHE"]  # of this process, made by tests/conftest.py
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_finish() -> None:
    """Thousands of tests and all that is imported stay to the end: no collection need look at them again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Workers of `-n auto`: three for two cores where memory allows it.

    None on a single core, for tests that are named, and where output is not captured: such tests start at
    once in pytest's own process and can be watched.
    """
    if is_part_of_the_suite(config) or config.option.capture == "no":
        return 0
    cores = available_cores()
    workers = min(cores + cores // 2, (memory_limit() or 0) // MEMORY_OF_A_WORKER, MOST_WORKERS)
    return workers if workers > 1 else 0


def is_part_of_the_suite(config: pytest.Config) -> bool:
    """Whether tests were chosen by path or name, or are those that failed last time."""
    named = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    return named or any(bool(config.getoption(option, None)) for option in ("keyword", "lf"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files to a worker, in the order in which they were collected."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Called in each worker, which all have to find the same order."""
    if hasattr(config, "workerinput"):
        items[:] = longest_files_first(items)


def longest_files_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Tests by file; those of a file keep their order."""
    lengths: Counter[str] = Counter()
    for item in items:
        names = {mark.name for mark in item.iter_markers()} | set(getattr(item, "fixturenames", ()))
        lengths[item.location[0]] += max((_TESTS[name] for name in names & _TESTS.keys()), default=1)
    return sorted(items, key=lambda item: (-lengths[item.location[0]], item.location[0]))
