"""Which checkpoints of a run stay."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from spikingbrain_train.checkpoint.retention import prune_checkpoints
from spikingbrain_train.storage.checkpoint_folder import iteration_folder, set_aside, set_latest_iteration

MAIN, OTHER = SimpleNamespace(is_main_process=True), SimpleNamespace(is_main_process=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Iterations 2, 4, 6 and 8, and two that have been set aside; 8 counts as newest."""
    for iteration in (2, 4, 6, 8, 9, 10):
        iteration_folder(tmp_path, iteration).mkdir()
    for superseded in (9, 10):
        set_aside(iteration_folder(tmp_path, superseded))
    set_latest_iteration(tmp_path, 8)
    return tmp_path


def _left(folder: Path) -> list[str]:
    return sorted(path.name.removeprefix("iter_00000") for path in folder.glob("iter_*"))


@pytest.mark.parametrize(
    ("keep_last", "left"),
    [(None, ["02", "04", "06", "08"]), (9, ["02", "04", "06", "08"]), (2, ["06", "08"]), (1, ["08"])],
)
def test_the_newest_stay_and_what_was_set_aside(folder: Path, keep_last: int | None, left: list[str]) -> None:
    prune_checkpoints(folder, keep_last, None, MAIN)
    assert _left(folder) == [*left, "09.superseded", "10.superseded"]


def test_the_one_that_counts_as_newest_stays_beside_newer_folders(folder: Path) -> None:
    set_latest_iteration(folder, 4)
    prune_checkpoints(folder, 1, None, MAIN)
    assert _left(folder) == ["04", "08", "09.superseded", "10.superseded"]


def test_only_the_main_process_removes(folder: Path) -> None:
    prune_checkpoints(folder, 1, None, OTHER)
    assert _left(folder)[:4] == ["02", "04", "06", "08"]


def test_those_of_round_numbers_stay_for_good(folder: Path) -> None:
    prune_checkpoints(folder, 1, 4, MAIN)
    assert _left(folder)[:2] == ["04", "08"]
    prune_checkpoints(folder, 1, 6, MAIN)
    assert _left(folder)[:1] == ["08"]
