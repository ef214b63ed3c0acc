"""A converted folder survives a power loss from the moment it has its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spikingbrain_train.conversion.output_folder import complete_folder


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
