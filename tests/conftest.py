"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import RankPool
from tests.leftovers import pytest_sessionfinish, pytest_terminal_summary  # noqa: F401  (pytest calls them)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Gloo ranks that run a function together (see tests/distributed/pool.py)."""
    pool = RankPool()
    yield pool
    pool.close()
