"""Files of a checkpoint are as they were saved, or are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage.checkpoint_manifest import (
    MANIFEST_FILE,
    Manifest,
    checksums,
    read_manifest,
    write_manifest,
)

PARTS = [(0, 300), (300, 500), (800, 200)]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(bytes(range(250)) * 4)
    write_manifest(tmp_path, {path.name: checksums(path, PARTS)})
    return path


def _manifest(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest


def _check(shard: Path) -> None:
    manifest = _manifest(shard.parent)
    manifest.check_sizes()
    for offset, length in PARTS:
        manifest.check_part(shard.name, offset, length)


def test_what_was_saved_passes(shard: Path) -> None:
    _check(shard)
    _manifest(shard.parent).check_file(shard.name)


@pytest.mark.parametrize("position", range(0, 1000, 37))
def test_every_flipped_bit_shows(shard: Path, position: int) -> None:
    content = bytearray(shard.read_bytes())
    content[position] ^= 1 << position % 8
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{shard.name} is damaged or of another save"):
        _check(shard)


def test_a_part_is_checked_by_itself(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[900] ^= 1
    shard.write_bytes(content)
    _manifest(shard.parent).check_part(shard.name, 300, 500)
    with pytest.raises(CheckpointError, match="bytes 800 to 1000"):
        _manifest(shard.parent).check_part(shard.name, 800, 200)


@pytest.mark.parametrize("content", [bytes(1000), b"\1" * 1000], ids=["zeros", "another save"])
def test_other_content_of_the_same_length_shows(shard: Path, content: bytes) -> None:
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="another save"):
        _check(shard)


@pytest.mark.parametrize("size", [0, 999, 1001])
def test_another_length_shows_without_reading(shard: Path, size: int) -> None:
    shard.write_bytes((shard.read_bytes() + b"?")[:size])
    with pytest.raises(CheckpointError, match=f"it has {size} bytes of 1000"):
        _manifest(shard.parent).check_sizes()


def test_a_part_that_was_not_saved_is_no_part(shard: Path) -> None:
    with pytest.raises(CheckpointError, match="another save"):
        _manifest(shard.parent).check_part(shard.name, 100, 100)


def test_folders_without_a_manifest_have_nothing_to_check(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"version": 1}', '{"version": 1, "files": {"a": [[0]]}}', '{"version": 1, "files": 3}'],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(tmp_path)


def test_a_manifest_stays_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_text('{"version": 1, "files": {"../other": [[0, 1, 2]]}}')
    with pytest.raises(CheckpointError, match="points outside"):
        read_manifest(tmp_path)


def test_a_later_version_is_said(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_text('{"version": 2, "files": {}}')
    with pytest.raises(CheckpointError, match="version 2"):
        read_manifest(tmp_path)
