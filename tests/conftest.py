"""Fixtures for all tests."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator

import pytest

from tests.distributed.pool import RankPool
from tests.leftovers import (  # noqa: F401  (pytest calls them)
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
    pytest_unconfigure,
)
from tests.programs import WITHOUT_TORCH, Programs
from tests.workers import (  # noqa: F401
    pytest_collection_finish,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_xdist_auto_num_workers,
    pytest_xdist_make_scheduler,
)

# Shells let what they start in the background ignore Ctrl-C, and what tests interrupt would inherit it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# MKL reads it at the first product of a process: deterministic runs in processes that have run other tests
# need it.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# Where transformers copies the code of exports, to import it from there: a folder of this process. Of two
# workers that load exports of one name, one would import what the other has written half. transformers reads
# it when it is imported, which a conftest.py below does before pytest is configured if one of its files is
# named: ranks, forked later, would have another folder, behind that one on the path that they are given.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="code-of-exports-")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Gloo ranks that run a function together (see tests/distributed/pool.py)."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def programs() -> Iterator[Programs]:
    """Runs commands without importing what is slow each time (see tests/programs.py)."""
    with Programs() as programs:
        yield programs


@pytest.fixture(scope="session")
def programs_without_torch() -> Iterator[Programs]:
    """For commands that have to do without torch, and are seen to."""
    with Programs(WITHOUT_TORCH) as programs:
        yield programs
