"""No run goes on from a damaged checkpoint: it stops with a sentence or, told to, takes the one before."""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import OnDamage, RunConfig, Verification
from spikingbrain_train.errors import CheckpointError, SpikingBrainError
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.file_checks import check_files
from spikingbrain_train.storage.checkpoint_folder import LATEST_ITERATION_FILE, iterations, latest_iteration
from spikingbrain_train.storage.checkpoint_manifest import MANIFEST_FILE
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import checkpoint_config, run_config, train

ONE_RANK = ParallelConfig()


def _config(folder: Path, text: Path, train_iters: int, on_damage: OnDamage = OnDamage.stop) -> RunConfig:
    config = run_config(folder, text)
    config.stage = replace(config.stage, train_iters=train_iters)
    config.checkpoint = checkpoint_config(save_interval=2, on_damage=on_damage)
    return config


@pytest.fixture(scope="module")
def finished(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """output_dir of a run of six steps with checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    ranks.run(train, _config(folder, text, 6), world_size=1, parallel=ONE_RANK)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def _iteration(run: Path, iteration: int) -> Path:
    return run / "checkpoints" / f"iter_{iteration:07d}"


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


def _outcome(groups: ProcessGroups, config: RunConfig) -> tuple[str, str]:
    """Kind and sentence of the refusal, or nothing and the number of steps."""
    try:
        return "", str(len(train(groups, config)))
    except SpikingBrainError as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_stops_with_a_sentence_or_takes_the_checkpoint_before(
    damage: str, ranks: RankPool, run: Path, text: Path
) -> None:
    name, inflict = DAMAGE[damage]
    inflict(_iteration(run, 6) / name)

    stopping = _config(run, text, 8)
    [(kind, sentence)] = ranks.run(_outcome, stopping, world_size=1, parallel=ONE_RANK)
    assert kind == "DamagedCheckpointError" and "\n" not in sentence, sentence
    assert str(_iteration(run, 6) / name) in sentence or "iter_0000006" in sentence
    assert f"{_iteration(run, 4)} is complete: write 4 into {LATEST_ITERATION_FILE}" in sentence
    assert latest_iteration(run / "checkpoints") == 6

    going_back = _config(run, text, 8, OnDamage.previous)
    assert ranks.run(_outcome, going_back, world_size=1, parallel=ONE_RANK) == [("", "4")]
    assert latest_iteration(run / "checkpoints") == 8 and iterations(run / "checkpoints") == [2, 4, 6, 8]
    aside = _iteration(run, 6).with_name("iter_0000006.damaged")
    assert aside.is_dir() == (damage != "no folder")
    assert not Path("/tmp/a-checkpoint-ran-code").exists()


@pytest.mark.parametrize("damage", ["half a shard", "empty model_config.yaml", "no manifest"])
def test_what_sizes_and_small_files_tell_is_said_before_torch_is_imported(
    damage: str, run: Path, text: Path
) -> None:
    name, inflict = DAMAGE[damage]
    inflict(_iteration(run, 6) / name)
    with pytest.raises(CheckpointError, match=re.escape(str(_iteration(run, 6) / name))):
        check_files(_config(run, text, 8))
    stored = check_files(_config(run, text, 8, OnDamage.previous))
    assert stored is not None and stored.iteration == 4


def test_all_ranks_go_back_together_past_several(ranks: RankPool, run: Path, text: Path) -> None:
    _flip(_iteration(run, 6) / SHARD)
    (_iteration(run, 4) / ".metadata").unlink()
    config = _config(run, text, 8, OnDamage.previous)
    assert ranks.run(_outcome, config, world_size=2, parallel=ONE_RANK) == [("", "6")] * 2


def test_where_all_are_damaged_none_is_renamed_away_but_the_newest_are_told_of(
    ranks: RankPool, run: Path, text: Path
) -> None:
    for iteration in (2, 4, 6):
        _cut(_iteration(run, iteration) / SHARD, 0.5)
    config = _config(run, text, 8, OnDamage.previous)
    [(kind, sentence)] = ranks.run(_outcome, config, world_size=1, parallel=ONE_RANK)
    assert kind == "DamagedCheckpointError" and "none of the 3 checkpoints" in sentence
    assert iterations(run / "checkpoints") == [2, 4, 6]


def test_a_tracker_that_holds_no_number_is_a_sentence_or_made_anew(
    ranks: RankPool, run: Path, text: Path
) -> None:
    (run / "checkpoints" / LATEST_ITERATION_FILE).write_text("iter_six")
    [(kind, sentence)] = ranks.run(_outcome, _config(run, text, 8), world_size=1, parallel=ONE_RANK)
    assert kind == "CheckpointError" and "instead of an iteration number" in sentence
    config = _config(run, text, 8, OnDamage.previous)
    assert ranks.run(_outcome, config, world_size=1, parallel=ONE_RANK) == [("", "2")]


def test_fast_verification_reads_no_weights_twice(ranks: RankPool, run: Path, text: Path) -> None:
    """What it is not meant to see: a flipped bit among numbers. What it is: a size."""
    _flip(_iteration(run, 6) / SHARD)
    config = _config(run, text, 8)
    config.checkpoint.verification = Verification.fast
    assert ranks.run(_outcome, config, world_size=1, parallel=ONE_RANK) == [("", "2")]
    _cut(_iteration(run, 8) / SHARD, 0.9)
    config.stage = replace(config.stage, train_iters=10)
    [(kind, sentence)] = ranks.run(_outcome, config, world_size=1, parallel=ONE_RANK)
    assert kind == "DamagedCheckpointError" and SHARD in sentence


@pytest.mark.parametrize("name", ["common.pt", "metadata.json"])
def test_damage_is_a_sentence_in_checkpoints_of_releases_without_manifests_too(
    name: str, ranks: RankPool, run: Path, text: Path
) -> None:
    for manifest in run.rglob(MANIFEST_FILE):
        manifest.unlink()
    config = _config(run, text, 8)
    content = (_iteration(run, 6) / name).read_bytes()
    (_iteration(run, 6) / name).write_text("{")
    [(kind, sentence)] = ranks.run(_outcome, config, world_size=1, parallel=ONE_RANK)
    assert kind == "DamagedCheckpointError" and f"{_iteration(run, 6) / name} is damaged" in sentence
    (_iteration(run, 6) / name).write_bytes(content)
    assert ranks.run(_outcome, config, world_size=1, parallel=ONE_RANK) == [("", "2")]
