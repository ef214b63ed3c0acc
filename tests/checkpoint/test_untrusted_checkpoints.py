"""Loading a checkpoint runs nothing that its files ask for."""

from __future__ import annotations

import enum
import os
import pickle
from pathlib import Path

import pytest
import torch

from spikingbrain_train.checkpoint.torch_dist import load_shards
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.runtime.checkpoint_metadata import METADATA_FILE, read_metadata
from tests.checkpoint.shards import save_shards
from tests.distributed.pool import RankPool


class MakesFolder:
    """Unpickling it makes ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def _sharded(content: torch.Tensor):
    """A tensor, and an object as megatron-core's optimizers put into checkpoints."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    return {
        "w": ShardedTensor.from_rank_offsets("w", content),
        "groups": ShardedObject("groups", [{"lr": 0.1}], (1,), (0,)),
    }


def _save(groups: ProcessGroups, folder: Path) -> None:
    save_shards(_sharded(torch.arange(6.0)), folder)


def _load(groups: ProcessGroups, folder: Path) -> tuple[str, str]:
    """Kind and sentence of the error, or nothing and what was loaded."""
    try:
        loaded = load_shards(_sharded(torch.zeros(6)), folder)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", str(loaded)


@pytest.fixture
def checkpoint(ranks: RankPool, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    ranks.run(_save, folder, world_size=1, parallel=ParallelConfig())
    return folder


def test_metadata_that_would_run_code_is_refused_before_megatron_reads_it(
    ranks: RankPool, checkpoint: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(MakesFolder(trace)))
    [(kind, sentence)] = ranks.run(_load, checkpoint, world_size=1, parallel=ParallelConfig())
    assert kind == "CheckpointError"
    assert f"{checkpoint / METADATA_FILE} is damaged or not checkpoint metadata" in sentence
    assert "posix.mkdir" in sentence
    assert not trace.exists()


def test_object_that_would_run_code_is_refused(ranks: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    """torch's reader unpickles objects without limits unless it is told not to."""
    trace = tmp_path / "trace"
    metadata = read_metadata(checkpoint)
    [place] = [place for index, place in metadata.storage_data.items() if index.fqn.startswith("groups")]
    data = checkpoint / "malicious.distcp"
    torch.save(MakesFolder(trace), data)
    place.relative_path, place.offset, place.length = data.name, 0, data.stat().st_size
    (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    [(kind, sentence)] = ranks.run(_load, checkpoint, world_size=1, parallel=ParallelConfig())
    assert kind == "FailedOnRank" and "weights_only" in sentence.lower()
    assert not trace.exists()


def test_untouched_checkpoint_is_read(ranks: RankPool, checkpoint: Path) -> None:
    [(kind, loaded)] = ranks.run(_load, checkpoint, world_size=1, parallel=ParallelConfig())
    assert kind == "" and "'lr': 0.1" in loaded


def test_what_these_tests_plant_does_run_when_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(MakesFolder(tmp_path / "trace")))
    assert (tmp_path / "trace").is_dir()


def test_members_that_python_before_3_11_4_pickled_by_name_are_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enum.Enum, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
    metadata = read_metadata(checkpoint)
    (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    assert b"getattr" in (checkpoint / METADATA_FILE).read_bytes()
    assert read_metadata(checkpoint) == metadata


@pytest.mark.parametrize(
    ("owner", "name"), [(torch.Size, "__class__"), (torch.Size, "mro"), ("text", "upper")]
)
def test_no_attribute_of_anything_else_is_taken(owner: object, name: str, tmp_path: Path) -> None:
    class TakesAttribute:
        def __reduce__(self):
            return getattr, (owner, name)

    (tmp_path / METADATA_FILE).write_bytes(pickle.dumps(TakesAttribute()))
    with pytest.raises(CheckpointError, match=f"takes '{name}' of something that is no enumeration"):
        read_metadata(tmp_path)


def test_metadata_that_is_no_metadata_is_refused(tmp_path: Path) -> None:
    (tmp_path / METADATA_FILE).write_bytes(pickle.dumps({"storage_data": {}}))
    with pytest.raises(CheckpointError, match="does not hold checkpoint metadata"):
        read_metadata(tmp_path)
