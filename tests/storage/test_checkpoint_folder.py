"""The folders of a run decide what it goes on from, and none of them is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage import checkpoint_folder
from spikingbrain_train.storage.checkpoint_manifest import checksums, write_manifest


def _checkpoint(folder: Path, iteration: int) -> Path:
    """A complete checkpoint as far as its file names and sizes tell."""
    checkpoint = folder / f"iter_{iteration:07d}"
    checkpoint.mkdir(parents=True)
    for name in ("model_config.yaml", ".metadata", "__0_0.distcp"):
        (checkpoint / name).write_text(f"{name} of {iteration}")
    write_manifest(checkpoint, {"__0_0.distcp": checksums(checkpoint / "__0_0.distcp")})
    return checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for iteration in (2, 4, 6):
        _checkpoint(tmp_path, iteration)
    checkpoint_folder.set_latest_iteration(tmp_path, 6)
    return tmp_path


def _tracker(folder: Path) -> Path:
    return folder / checkpoint_folder.LATEST_ITERATION_FILE


def test_the_tracker_decides_where_it_is(folder: Path) -> None:
    checkpoint_folder.set_latest_iteration(folder, 2)
    assert checkpoint_folder.newest_iteration(folder) == 2


def test_without_tracker_the_newest_complete_folder_is_taken(folder: Path) -> None:
    _tracker(folder).unlink()
    assert checkpoint_folder.newest_iteration(folder) == 6
    (folder / "iter_0000006" / ".metadata").unlink()
    assert checkpoint_folder.newest_iteration(folder) == 4
    (folder / "iter_0000004" / "__0_0.distcp").write_text("cut")
    assert checkpoint_folder.newest_iteration(folder) == 2


def test_incomplete_folders_alone_are_no_reason_to_start_over(folder: Path) -> None:
    _tracker(folder).unlink()
    for checkpoint in folder.glob("iter_*"):
        (checkpoint / "model_config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"iter_0000006 is incomplete.*move the iter_\* folders away"):
        checkpoint_folder.newest_iteration(folder)


def test_an_empty_folder_has_no_iteration(tmp_path: Path) -> None:
    assert checkpoint_folder.newest_iteration(tmp_path / "nowhere") is None
    assert checkpoint_folder.newest_iteration(tmp_path) is None


def test_a_folder_to_load_from_that_lost_its_tracker_is_refused_with_the_number_to_write(
    folder: Path,
) -> None:
    _tracker(folder).unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint\.load=.* write 6 into it to take .*iter_0000006"):
        checkpoint_folder.latest_checkpoint(folder, "checkpoint.load")


def test_a_missing_newest_checkpoint_names_the_older_complete_one(folder: Path) -> None:
    (folder / "iter_0000006" / ".metadata").unlink()
    (folder / "iter_0000004" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"iter_0000002 is complete: write 2 into"):
        checkpoint_folder.latest_checkpoint(folder, "output_dir")


def test_newer_checkpoints_are_set_aside_and_never_overwritten(folder: Path) -> None:
    assert [path.name for path in checkpoint_folder.set_aside_newer(folder, 2)] == [
        "iter_0000004.superseded",
        "iter_0000006.superseded",
    ]
    _checkpoint(folder, 6)
    assert [path.name for path in checkpoint_folder.set_aside_newer(folder, 2)] == [
        "iter_0000006.superseded-2"
    ]
    assert checkpoint_folder.iterations(folder) == [2]
    assert (folder / "iter_0000006.superseded" / "__0_0.distcp").read_text() == "__0_0.distcp of 6"
