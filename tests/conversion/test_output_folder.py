"""A converted folder survives a power loss from the moment it has its name."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from spikingbrain_train.conversion.output_folder import check_output_folder, complete_folder
from spikingbrain_train.errors import CheckpointError


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaces another"])
def test_a_folder_is_on_the_disk_before_it_has_its_name(
    replaces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    if replaces:
        output.mkdir()
        (output / "old").touch()
    synced: dict[str, bool] = {}
    fsync = os.fsync

    def record(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        synced[name] = (output / "model.safetensors").exists()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with complete_folder(output) as temporary:
        (temporary / "model.safetensors").write_text("weights")
        (temporary / "inner").mkdir()
        (temporary / "inner" / "config.json").write_text("{}")
    assert not synced["model.safetensors"] and not synced["config.json"] and not synced["inner"]
    assert synced[tmp_path.name]  # the folder that holds the name, after the rename
    assert sorted(path.name for path in output.iterdir()) == ["inner", "model.safetensors"]


def test_an_error_with_another_file_names_that_file(tmp_path: Path) -> None:
    """Not the output, whose disk has nothing to do with it."""
    with (
        pytest.raises(
            CheckpointError, match=r"source/LICENSE cannot be used .*nothing was changed at .*/out"
        ),
        complete_folder(tmp_path / "out") as temporary,
    ):
        shutil.copyfile(tmp_path / "source" / "LICENSE", temporary / "LICENSE")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("named", [False, True])
def test_an_error_of_the_output_names_the_output(named: bool, tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"/out cannot be written \(No space left on device\)"),
        complete_folder(tmp_path / "out") as temporary,
    ):
        # shutil.copyfile names both the source and the target.
        names = (str(tmp_path / "LICENSE"), None, str(temporary / "LICENSE")) if named else ()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *names)


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaces another"])
def test_a_folder_that_is_in_place_is_not_said_to_be_missing(
    replaces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    if replaces:
        output.mkdir()
    fsync = os.fsync

    def fail_behind_the_rename(descriptor: int) -> None:
        if (output / "config.json").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_behind_the_rename)
    with (
        pytest.raises(CheckpointError, match="out is complete, but the disk did not confirm its name"),
        complete_folder(output) as temporary,
    ):
        (temporary / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (output / "config.json").exists()


def test_a_folder_that_somebody_makes_is_not_begun_again(tmp_path: Path) -> None:
    def check(dry_run: bool) -> None:
        check_output_folder(
            tmp_path / "out",
            source=tmp_path / "source",
            overwrite=True,
            marker="config.json",
            needed_bytes=0,
            dry_run=dry_run,
        )

    with complete_folder(tmp_path / "out") as temporary:
        for dry_run in (False, True):
            sentence = (
                rf"out is being written by another command \(process {os.getpid()} on .*\); wait for it"
            )
            with pytest.raises(CheckpointError, match=sentence):
                check(dry_run)
        (temporary / "config.json").write_text("{}")
    check(False)
    assert (tmp_path / "out" / "config.json").exists()


def test_what_somebody_else_made_meanwhile_stays(tmp_path: Path) -> None:
    with (
        pytest.raises(
            CheckpointError, match="out was made by another command meanwhile; nothing was changed"
        ),
        complete_folder(tmp_path / "out") as temporary,
    ):
        (temporary / "config.json").write_text("mine")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "theirs"
