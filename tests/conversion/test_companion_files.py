"""Which files travel with a checkpoint, and that no link takes a file of this machine along."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from spikingbrain_train.conversion.companion_files import find_companion_files
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from tests.conversion.hf_models import HFCheckpoint, all_tensors

SMALL = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("a file of this machine")
    return path


@pytest.mark.parametrize("relative", [True, False])
def test_a_link_out_of_the_folder_is_not_followed_and_said(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, secret: Path, relative: bool
) -> None:
    source, _ = hf_checkpoint(**SMALL)
    (source / "LICENSE").symlink_to("../secret" if relative else secret)
    report = import_checkpoint(source, tmp_path / "out")
    copied = tmp_path / "out/iter_0000000/hf_source"
    assert {path.name for path in copied.iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
    }
    assert any("LICENSE is a link out of" in note for note in report.notes)
    assert any("LICENSE" in note for note in import_checkpoint(source, tmp_path / "dry", dry_run=True).notes)


def test_a_link_in_a_checkpoint_is_not_followed_on_export(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, secret: Path
) -> None:
    source, _ = hf_checkpoint(**SMALL)
    import_checkpoint(source, tmp_path / "megatron")
    (tmp_path / "megatron/iter_0000000/hf_source/NOTICE").symlink_to(secret)
    report = export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    assert not (tmp_path / "out/NOTICE").exists()
    assert any("NOTICE is a link out of" in note for note in report.notes)


def test_a_source_that_names_its_architecture_alone_goes_back(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, _ = hf_checkpoint(**SMALL)
    config = json.loads((source / "config.json").read_text())
    del config["model_type"]
    (source / "config.json").write_text(json.dumps(config))
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == config


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "LICENSE.en").write_text("free")
    (tmp_path / "LICENSE").symlink_to("LICENSE.en")
    found = find_companion_files(tmp_path)
    assert (found.names, found.left_behind) == (["LICENSE", "LICENSE.en"], [])


def test_a_folder_of_templates_that_lies_elsewhere_is_left_behind(tmp_path: Path, secret: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "model"
    elsewhere.mkdir()
    folder.mkdir()
    (elsewhere / "tool.jinja").write_text("{{ secret }}")
    (folder / "additional_chat_templates").symlink_to(elsewhere)
    found = find_companion_files(folder)
    assert not found.names and "additional_chat_templates/tool.jinja" in found.left_behind[0]


@pytest.mark.parametrize("target", ["nowhere", "LICENSE"])
def test_links_to_nothing_and_to_themselves_are_said(tmp_path: Path, target: str) -> None:
    (tmp_path / "LICENSE").symlink_to(target)
    found = find_companion_files(tmp_path)
    assert not found.names and "LICENSE is a link to nothing" in found.left_behind[0]


def test_a_model_in_a_hugging_face_cache_is_imported_with_all_its_files(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    """Its snapshots consist of links to blobs, weights included."""
    source, _ = hf_checkpoint(**SMALL, folder="models--org--name/plain")
    repository = source.parent
    snapshot = repository / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        os.replace(path, repository / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    (repository / "blobs" / "private").write_text("of the same model, and so no secret")
    (snapshot / "LICENSE").symlink_to("../../blobs/private")
    (repository / "secret").write_text("beside the blobs")
    (snapshot / "NOTICE").symlink_to("../../secret")
    report = import_checkpoint(snapshot, tmp_path / "out")
    copied = {path.name for path in (tmp_path / "out/iter_0000000/hf_source").iterdir()}
    assert copied == {"config.json", "generation_config.json", "tokenizer.json", "LICENSE"}
    assert [note for note in report.notes if "link" in note] == [report.notes[0]]
    assert "NOTICE" in report.notes[0]
    export_checkpoint(tmp_path / "out", tmp_path / "back")
    assert all_tensors(tmp_path / "back").keys() == all_tensors(snapshot).keys()
