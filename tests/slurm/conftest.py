"""A cluster for every test, and what its jobs train on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import small_runs
from tests.slurm.cluster import Cluster, missing_programs


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Two nodes, up in two seconds; skips where Slurm is not installed.

    New ones for every test: Slurm 22.05 was seen to keep a node that had been down from jobs of a later one.
    """
    if missing := missing_programs():
        pytest.skip(f"{', '.join(missing)} missing; install slurm-wlm and munge (Debian, Ubuntu)")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons are started as root")
    # A short path: a socket's has to be shorter than 108 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.close()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of an indexed dataset."""
    return small_runs.write_text(tmp_path_factory.mktemp("text"))
