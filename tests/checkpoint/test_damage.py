"""No run goes on from a damaged checkpoint: it stops with a sentence or, told to, takes the one before."""

from __future__ import annotations

import inspect
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from spikingbrain_train.config.run import CheckpointConfig, OnDamage, RunConfig, Verification
from spikingbrain_train.errors import CheckpointError, SpikingBrainError
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.file_checks import check_files
from spikingbrain_train.storage.checkpoint_folder import LATEST_ITERATION_FILE, iterations, latest_iteration
from spikingbrain_train.storage.checkpoint_manifest import MANIFEST_FILE
from tests.checkpoint.saved_runs import ONE_RANK, checkpoint_of, outcome, saving_config
from tests.distributed.pool import RankPool


class _RunsCode:
    """What unpickling would call a function for."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path("/tmp/a-checkpoint-ran-code"),)  # type: ignore[return-value]


def _cut(path: Path, left: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])


def _change(path: Path, at: float, new: bytes) -> None:
    content = bytearray(path.read_bytes())
    begin = int(len(content) * at)
    content[begin : begin + len(new)] = new
    path.write_bytes(content)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def _pickled(path: Path) -> None:
    size = path.stat().st_size
    path.write_bytes(pickle.dumps(_RunsCode()).ljust(size, b"\0"))


def _another_rate(path: Path) -> None:
    path.write_text(re.sub(r"(?m)^( +min_lr: ).*$", r"\g<1>0.25", path.read_text()))


def _half_deleted(folder: Path) -> None:
    for path in sorted(path for path in folder.iterdir() if path.is_file())[::2]:
        path.unlink()


def _all_deleted(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


SHARD = "__0_0.distcp"
DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "half a shard": (SHARD, lambda path: _cut(path, 0.5)),
    "a shard that lacks its last bytes": (SHARD, lambda path: _cut(path, 0.999)),
    "an empty shard": (SHARD, lambda path: _cut(path, 0)),
    "a shard that has grown": (SHARD, lambda path: path.write_bytes(path.read_bytes() + bytes(4096))),
    "a flipped bit in the middle of a shard": (SHARD, _flip),
    "a hole of zeros in a shard": (SHARD, lambda path: _change(path, 0.4, bytes(4096))),
    "no shard": (SHARD, Path.unlink),
    "the shard of an older save": (
        SHARD,
        lambda path: shutil.copyfile(path.parents[1] / "iter_0000004" / path.name, path),
    ),
    "a pickle in place of a shard": (SHARD, _pickled),
    "no .metadata": (".metadata", Path.unlink),
    "empty .metadata": (".metadata", lambda path: _cut(path, 0)),
    "flipped .metadata": (".metadata", _flip),
    "a pickle in place of .metadata": (".metadata", _pickled),
    "text in place of common.pt": ("common.pt", lambda path: path.write_text("these are no weights")),
    "no common.pt": ("common.pt", Path.unlink),
    "half of metadata.json": ("metadata.json", lambda path: _cut(path, 0.5)),
    "no metadata.json": ("metadata.json", Path.unlink),
    "no manifest": (MANIFEST_FILE, Path.unlink),
    "half of the manifest": (MANIFEST_FILE, lambda path: _cut(path, 0.5)),
    "the manifest of an older save": (
        MANIFEST_FILE,
        lambda path: shutil.copyfile(path.parents[1] / "iter_0000004" / path.name, path),
    ),
    "empty model_config.yaml": ("model_config.yaml", lambda path: _cut(path, 0)),
    "another rate in run_config.yaml": ("run_config.yaml", _another_rate),
    "no run_record.json": ("run_record.json", Path.unlink),
    "half of the files": ("", _half_deleted),
    "an empty folder": ("", _all_deleted),
    "no folder": ("", shutil.rmtree),
}


SIZES_DO_NOT_TELL = {"a flipped bit in the middle of a shard", "the shard of an older save"}
"""Numbers in place of others: what checkpoint.verification=fast is documented not to see."""


def _going_on(groups: ProcessGroups, configs: list[RunConfig]) -> list[tuple[str, str]]:
    """Of each run: the iteration it goes on from, or kind and sentence of what stops it."""
    from spikingbrain_train.training.trainer import Trainer

    found = []
    for config in configs:
        try:
            found.append(("", str(Trainer(config, groups).state.iteration)))
        except SpikingBrainError as error:
            found.append((type(error).__name__, str(error)))
    return found


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_stops_with_a_sentence_or_takes_the_checkpoint_before(
    damage: str, ranks: RankPool, run: Path, text: Path
) -> None:
    name, inflict = DAMAGE[damage]
    inflict(checkpoint_of(run, 6) / name)
    configs, copies = [], []
    for verification in Verification:
        copies.append(run.with_name(verification.value))
        shutil.copytree(run, copies[-1])
        for on_damage in (OnDamage.stop, OnDamage.previous):
            changes = {"verification": verification, "on_damage": on_damage}
            configs.append(saving_config(copies[-1], text, 7, **changes))
    found = iter(zip(configs, *ranks.run(_going_on, configs, world_size=1, parallel=ONE_RANK), strict=True))
    for copy, verification in zip(copies, Verification, strict=True):
        (stopping, (kind, sentence)), (_, going_back) = next(found), next(found)
        damaged = checkpoint_of(copy, 6)
        if verification is Verification.fast and damage in SIZES_DO_NOT_TELL:
            assert (kind, sentence) == going_back == ("", "6")
            continue
        assert kind == "DamagedCheckpointError" and "\n" not in sentence, stopping.checkpoint
        assert str(damaged / name) in sentence or "iter_0000006" in sentence
        assert f"{checkpoint_of(copy, 4)} is complete: write 4 into {LATEST_ITERATION_FILE}" in sentence
        assert going_back == ("", "4") and latest_iteration(copy / "checkpoints") == 4
        assert iterations(copy / "checkpoints") == [2, 4]
        assert damaged.with_name("iter_0000006.damaged").is_dir() == (damage != "no folder")
    assert not Path("/tmp/a-checkpoint-ran-code").exists()


def test_there_are_twenty_ways_and_full_verification_sees_each() -> None:
    assert len(DAMAGE) >= 20 and set(DAMAGE) > SIZES_DO_NOT_TELL
    assert inspect.signature(CheckpointConfig).parameters["verification"].default is Verification.full


@pytest.mark.parametrize("damage", ["half a shard", "empty model_config.yaml", "no manifest"])
def test_what_sizes_and_small_files_tell_is_said_before_torch_is_imported(
    damage: str, run: Path, text: Path
) -> None:
    name, inflict = DAMAGE[damage]
    inflict(checkpoint_of(run, 6) / name)
    with pytest.raises(CheckpointError, match=re.escape(str(checkpoint_of(run, 6) / name))):
        check_files(saving_config(run, text, 8))
    stored = check_files(saving_config(run, text, 8, on_damage=OnDamage.previous))
    assert stored is not None and stored.iteration == 4


def test_all_ranks_go_back_together_past_several(ranks: RankPool, run: Path, text: Path) -> None:
    _flip(checkpoint_of(run, 6) / SHARD)
    (checkpoint_of(run, 4) / ".metadata").unlink()
    config = saving_config(run, text, 8, on_damage=OnDamage.previous)
    assert ranks.run(outcome, config, world_size=2, parallel=ONE_RANK) == [("", "6")] * 2


def test_where_all_are_damaged_none_is_renamed_away_but_the_newest_are_told_of(
    ranks: RankPool, run: Path, text: Path
) -> None:
    for iteration in (2, 4, 6):
        _cut(checkpoint_of(run, iteration) / SHARD, 0.5)
    config = saving_config(run, text, 8, on_damage=OnDamage.previous)
    [(kind, sentence)] = ranks.run(outcome, config, world_size=1, parallel=ONE_RANK)
    assert kind == "DamagedCheckpointError" and "none of the 3 checkpoints" in sentence
    assert iterations(run / "checkpoints") == [2, 4, 6]


def test_a_tracker_that_holds_no_number_is_a_sentence_or_made_anew(
    ranks: RankPool, run: Path, text: Path
) -> None:
    (run / "checkpoints" / LATEST_ITERATION_FILE).write_text("iter_six")
    [(kind, sentence)] = ranks.run(outcome, saving_config(run, text, 8), world_size=1, parallel=ONE_RANK)
    assert kind == "CheckpointError" and "instead of an iteration number" in sentence
    config = saving_config(run, text, 8, on_damage=OnDamage.previous)
    assert ranks.run(outcome, config, world_size=1, parallel=ONE_RANK) == [("", "2")]


@pytest.mark.parametrize("name", ["common.pt", "metadata.json"])
def test_damage_is_a_sentence_in_checkpoints_of_releases_without_manifests_too(
    name: str, ranks: RankPool, run: Path, text: Path
) -> None:
    for manifest in run.rglob(MANIFEST_FILE):
        manifest.unlink()
    config = saving_config(run, text, 8)
    content = (checkpoint_of(run, 6) / name).read_bytes()
    (checkpoint_of(run, 6) / name).write_text("{")
    [(kind, sentence)] = ranks.run(outcome, config, world_size=1, parallel=ONE_RANK)
    assert kind == "DamagedCheckpointError" and f"{checkpoint_of(run, 6) / name} is damaged" in sentence
    (checkpoint_of(run, 6) / name).write_bytes(content)
    assert ranks.run(outcome, config, world_size=1, parallel=ONE_RANK) == [("", "2")]
