"""What a power loss may do to renamed files: nothing, because content and names reach the disk in order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spikingbrain_train.storage.durable_files import (
    append_line_durably,
    rename_durably,
    sync_tree,
    write_text_durably,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced and renamed, by name, in order."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        done.append(f"rename to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    return done


def test_a_text_file_is_synced_before_its_rename_and_its_folder_after(
    tmp_path: Path, calls: list[str]
) -> None:
    path = tmp_path / "tracker.txt"
    path.write_text("old")
    write_text_durably(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    assert [call.split(".txt.")[0] for call in calls] == [
        "sync .tracker",
        "rename to tracker.txt",
        f"sync {tmp_path.name}",
    ]


def test_a_folder_is_synced_with_all_that_is_in_it(tmp_path: Path, calls: list[str]) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a").touch()
    (folder / "b").touch()
    (folder / "dangling").symlink_to("nowhere")
    sync_tree(folder)
    assert sorted(calls) == ["sync a", "sync b", "sync folder", "sync inner"]
    rename_durably(folder, tmp_path / "final")
    assert calls[4:] == ["rename to final", f"sync {tmp_path.name}"]


def test_a_failed_write_leaves_the_old_text_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tracker.txt"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text_durably(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_text_files_are_replaced_in_one_place() -> None:
    package = Path(__file__).parents[2] / "spikingbrain_train"
    replacing = {
        str(path.relative_to(package)) for path in package.rglob("*.py") if "os.replace(" in path.read_text()
    }
    # Folders, files that are no text, and a cache that machines may share: process ids name nothing there.
    others = {
        "storage/temporary_folder.py",
        "data/indexed.py",
        "data/token_ids.py",
        "data/tokenizer_cache.py",
        "pipelines/demo/smollm2.py",
    }
    assert replacing <= others | {"storage/durable_files.py", "reporting/plots/picture.py"}


def test_a_line_is_added_as_a_whole_behind_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for line in ("one", "two"):
        append_line_durably(path, line)
    assert path.read_text() == "one\ntwo\n"
    path.write_text("one\ntw")  # the disk was full
    append_line_durably(path, "three")
    assert path.read_text() == "one\ntw\nthree\n"
