"""Kinds from outside live in a test session like guests: they are gone when the test that needs them ends."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest

from spikingbrain_train.architecture.feed_forwards import FEED_FORWARDS
from spikingbrain_train.architecture.linear_transforms import LINEAR_TRANSFORMS
from spikingbrain_train.architecture.mixers import MIXERS
from spikingbrain_train.config import sections
from tests.distributed.pool import RankPool

PLUGINS = ("tests.plugins.fixed_decay", "tests.plugins.relu_squared", "tests.plugins.rounding")


@pytest.fixture(scope="module")
def plugins() -> Iterator[None]:
    """The kinds of tests/plugins, registered in this process."""
    known = (MIXERS._kinds, FEED_FORWARDS._kinds, LINEAR_TRANSFORMS._kinds, sections._sections)
    before = [dict(table) for table in known]  # type: ignore[call-overload]
    for module in PLUGINS:
        importlib.reload(importlib.import_module(module))
    yield
    for table, entries in zip(known, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Ranks of their own: what a rank has imported stays registered there."""
    pool = RankPool()
    yield pool
    pool.close()
