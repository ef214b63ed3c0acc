"""Damaged folders and unusable outputs: reshard, diff and average say so in a sentence and leave nothing."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spikingbrain_train.checkpoint.data_files import MegatronCheckpointWriter
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion import output_folder
from spikingbrain_train.conversion.average import average_checkpoints, equal_shares
from spikingbrain_train.conversion.difference import diff_checkpoints
from spikingbrain_train.conversion.reshard import reshard_checkpoint
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.planning.token_history import history_with
from spikingbrain_train.storage.checkpoint_folder import MODEL_CONFIG_FILE, latest_checkpoint
from tests.conversion.hf_models import HFCheckpoint
from tests.conversion.test_bad_input import SMALL

OLD = Path(__file__).parents[1] / "old_checkpoints/76b/checkpoints/iter_0000002"
ONE = ParallelConfig()


def reshard(folder: Path, out: Path) -> object:
    return reshard_checkpoint(folder, out, ONE, overwrite=True)


def average(folder: Path, out: Path) -> object:
    return average_checkpoints([OLD, folder], out, equal_shares(2), overwrite=True)


def average_hf(folder: Path, out: Path) -> object:
    return average_checkpoints([folder, folder], out, equal_shares(2))


def diff(folder: Path, out: Path) -> object:
    return diff_checkpoints(OLD, folder)


def diff_hf(folder: Path, out: Path) -> object:
    return diff_checkpoints(folder, folder)


WRITES: list[Callable[[Path, Path], object]] = [reshard, average]
ALL = [*WRITES, diff]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A checkpoint with everything, to be damaged."""
    return Path(shutil.copytree(OLD, tmp_path / "iter_0000002"))


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write the weights of a checkpoint anew, as ``change`` leaves them."""
    reader = MegatronCheckpointReader(folder)
    tensors = {name: reader.read(name) for name in reader.tensors if not name.startswith("optimizer.")}
    change(tensors)
    for path in folder.iterdir():
        if path.is_file() and path.name != MODEL_CONFIG_FILE:
            path.unlink()
    with MegatronCheckpointWriter(folder, 2) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def refuses(act: Callable[[Path, Path], object], folder: Path, tmp_path: Path, sentence: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=sentence) as refused:
        act(folder, tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("act", ALL)
def test_a_missing_shard(act: Callable, copied: Path, tmp_path: Path) -> None:
    (copied / "__0_1.distcp").unlink()
    refuses(act, copied, tmp_path, r"__0_1\.distcp is missing; copy the checkpoint again")


@pytest.mark.parametrize("act", ALL)
def test_tensors_that_the_model_does_not_have(act: Callable, copied: Path, tmp_path: Path) -> None:
    rewritten(copied, lambda tensors: tensors.update({"decoder.layers.0.extra": torch.ones(3)}))
    refuses(act, copied, tmp_path, r"the parameter decoder\.layers\.0\.extra is not part of the model")


@pytest.mark.parametrize("act", ALL)
def test_tensors_that_are_missing(act: Callable, copied: Path, tmp_path: Path) -> None:
    rewritten(copied, lambda tensors: tensors.pop("decoder.layers.1.mlp.router.weight"))
    refuses(act, copied, tmp_path, r"the parameter decoder\.layers\.1\.mlp\.router\.weight is missing")


@pytest.mark.parametrize("act", ALL)
def test_pickles_in_place_of_tensors(act: Callable, copied: Path, tmp_path: Path) -> None:
    metadata = (copied / ".metadata").read_bytes()
    (copied / "manifest.json").unlink()
    (copied / ".metadata").write_bytes(pickle.dumps(subprocess.Popen))
    refuses(act, copied, tmp_path, r"\.metadata is damaged or not checkpoint metadata")
    (copied / ".metadata").write_bytes(metadata)
    shard = copied / "__0_0.distcp"
    shard.write_bytes(pickle.dumps([1] * shard.stat().st_size, protocol=2)[: shard.stat().st_size])
    refuses(act, copied, tmp_path, r"__0_0\.distcp: .* cannot be read .*; copy the checkpoint again")


@pytest.mark.parametrize("act", WRITES)
def test_nan_and_infinity(act: Callable, copied: Path, tmp_path: Path) -> None:
    rewritten(copied, lambda tensors: tensors["sink_embedding.weight"][1, 2:3].fill_(float("inf")))
    refuses(act, copied, tmp_path, r"sink_embedding\.weight holds an infinity \(first at \[1, 2\]\); ")
    reshard_checkpoint(copied, tmp_path / "kept", ONE, allow_damaged_weights=True)
    assert not diff_checkpoints(copied, tmp_path / "kept").differ


@pytest.mark.parametrize("act", [average_hf, diff_hf])
def test_hugging_face_folders(act: Callable, hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL, max_shard_size="1KB")
    shard = sorted(source.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    refuses(act, source, tmp_path, f"{shard.name} is missing; copy the whole folder from its source")
    shard.write_bytes(pickle.dumps(content))
    refuses(act, source, tmp_path, f"{shard.name} is not a complete safetensors file")
    shard.write_bytes(content)
    index = source / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.bias"] = shard.name
    index.write_text(json.dumps(values))
    refuses(act, source, tmp_path, r"does not hold model\.norm\.bias, although .*index\.json says so")
    index.unlink()
    refuses(act, source, tmp_path, "has neither model.safetensors nor model.safetensors.index.json")


def test_a_damaged_derivation(tmp_path: Path) -> None:
    reshard_checkpoint(OLD, tmp_path / "out", ONE)
    here = latest_checkpoint(tmp_path / "out", "out")
    (here / "derivation.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"derivation\.json does not say what the folder was made from"):
        reshard_checkpoint(here, tmp_path / "again", ONE)
    assert history_with(here).unknown is not None and not (tmp_path / "again").exists()


@pytest.mark.parametrize("act", WRITES)
def test_a_disk_that_fills_up_leaves_what_was_there(
    act: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full stands for the full disk: every write to it fails with ENOSPC."""
    act(OLD, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    open_path = Path.open

    def open_full(self: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        is_written = self.suffix == ".distcp" and mode != "rb"
        return open_path(Path("/dev/full") if is_written else self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(CheckpointError, match=r"No space left on device\); nothing was changed"):
        act(OLD, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    monkeypatch.undo()
    usage = output_folder.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: usage)
    refuses(act, OLD, tmp_path, r"0\.0 MB free; make room")


@pytest.mark.parametrize("act", WRITES)
def test_what_a_killed_call_left_is_removed_by_the_next(act: Callable, tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    (tmp_path / f"out.tmp-{killed.pid}" / "new" / "iter_0000002").mkdir(parents=True)
    act(OLD, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("act", WRITES)
def test_overwrite_removes_nothing_but_its_own(act: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(OLD.parent, out)
    mark = re.escape("/derivation.json, so it was not made by this command and --overwrite leaves it alone")
    refuses(act, OLD, tmp_path, mark)
    shutil.rmtree(out)
    act(OLD, out)
    shutil.copytree(OLD, out / "iter_0000007")  # a run has gone on from it there
    refuses(act, OLD, tmp_path, "also holds .*iter_0000007, which --overwrite would remove")
