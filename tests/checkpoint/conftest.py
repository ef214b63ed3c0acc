"""The tokenized text of the distributed tests, for runs that save, and a run that has."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.checkpoint.saved_runs import ONE_RANK, saving_config
from tests.distributed.conftest import text
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import train

__all__ = ["finished", "run", "text"]


@pytest.fixture(scope="session")
def finished(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """output_dir of a run of six steps with checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    ranks.run(train, saving_config(folder, text, 6), world_size=1, parallel=ONE_RANK)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"
