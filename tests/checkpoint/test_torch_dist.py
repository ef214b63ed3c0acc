"""Checkpoints have one form, whichever megatron-core writes them."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spikingbrain_train.checkpoint.background import BackgroundWork
from spikingbrain_train.checkpoint.torch_dist import ShardWriters, load_shards
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.runtime import megatron_versions
from tests.checkpoint.shards import save_shards
from tests.distributed.pool import RankPool

FULL = torch.arange(24.0).reshape(4, 6)


def _rows(groups: ProcessGroups, content: torch.Tensor):
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    size = groups.world_size
    mine = content.chunk(size)[groups.rank].clone()
    return {"weights": {"w": ShardedTensor.from_rank_offsets("w", mine, (0, groups.rank, size))}}


def _save(groups: ProcessGroups, folder: Path) -> None:
    save_shards({**_rows(groups, FULL), "iteration": 7, "scheduler": {"lr": 0.1}}, folder)


def _load(groups: ProcessGroups, folder: Path) -> tuple[torch.Tensor, int, dict[str, float]]:
    loaded = load_shards(_rows(groups, torch.zeros_like(FULL)), folder)
    return loaded["weights"]["w"], loaded["iteration"], loaded["scheduler"]


def _load_error(groups: ProcessGroups, folder: Path) -> tuple[str, str]:
    try:
        _load(groups, folder)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def test_checkpoint_of_two_ranks_is_read_by_one(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(_save, tmp_path, world_size=2, parallel=ParallelConfig())
    [(weights, iteration, scheduler)] = ranks.run(_load, tmp_path, world_size=1, parallel=ParallelConfig())
    assert torch.equal(weights, FULL) and iteration == 7 and scheduler == {"lr": 0.1}


def test_checkpoint_has_the_files_that_every_version_reads(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(_save, tmp_path, world_size=1, parallel=ParallelConfig())
    common = torch.load(tmp_path / "common.pt", weights_only=True)  # 0.16 finds plain values here alone
    assert common == {"iteration": 7, "scheduler": {"lr": 0.1}}
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    assert metadata["sharded_backend"] == "torch_dist"
    assert not list(tmp_path.glob(".common*"))


def test_metadata_without_the_common_backend_is_read(ranks: RankPool, tmp_path: Path) -> None:
    """0.19 leaves it out; 0.16 must read such a checkpoint too."""
    ranks.run(_save, tmp_path, world_size=1, parallel=ParallelConfig())
    metadata = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    [(weights, iteration, _)] = ranks.run(_load, tmp_path, world_size=1, parallel=ParallelConfig())
    assert torch.equal(weights, FULL) and iteration == 7


def test_missing_shard_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(_save, tmp_path, world_size=1, parallel=ParallelConfig())
    for shard in tmp_path.glob("*.distcp"):
        shard.unlink()
    [(kind, sentence)] = ranks.run(_load_error, tmp_path, world_size=1, parallel=ParallelConfig())
    assert kind == "CheckpointError" and ".distcp is missing" in sentence


def test_shard_that_lacks_its_last_byte_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(_save, tmp_path, world_size=1, parallel=ParallelConfig())
    [shard] = tmp_path.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-1])
    [(kind, sentence)] = ranks.run(_load_error, tmp_path, world_size=1, parallel=ParallelConfig())
    assert kind == "CheckpointError" and "is damaged: it has" in sentence


def test_failure_inside_torch_is_an_ordinary_exception(ranks: RankPool, tmp_path: Path) -> None:
    """torch raises a BaseException there, which would slip through every `except Exception`."""
    ranks.run(_save, tmp_path, world_size=1, parallel=ParallelConfig())
    [shard] = tmp_path.glob("*.distcp")
    shard.write_bytes(b"?" * shard.stat().st_size)
    [(kind, sentence)] = ranks.run(_load_error, tmp_path, world_size=1, parallel=ParallelConfig())
    assert kind in ("FailedOnRank", "UnpicklingError", "RuntimeError") and sentence


def test_checkpoint_without_common_pt_needs_a_version_that_does_without(
    ranks: RankPool, tmp_path: Path
) -> None:
    ranks.run(_save, tmp_path, world_size=1, parallel=ParallelConfig())
    (tmp_path / "common.pt").unlink()
    [(kind, sentence)] = ranks.run(_load_error, tmp_path, world_size=1, parallel=ParallelConfig())
    if megatron_versions.MEGATRON_VERSION.release < (0, 17):
        assert kind == "CheckpointError" and "common.pt is missing" in sentence
    else:
        assert kind == ""


def _writers(monkeypatch: pytest.MonkeyPatch, folder: Path, **request: object) -> ShardWriters:
    """Writers of what megatron-core is made to ask for."""
    from megatron.core import dist_checkpointing

    asked = SimpleNamespace(**{"async_fn_kwargs": {}, "finalize_fns": [], "preload_fn": None, **request})
    monkeypatch.setattr(dist_checkpointing, "save", lambda *_, **__: asked)
    return ShardWriters({}, folder)


def test_what_lies_on_a_gpu_is_copied_before_the_thread_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No GPU is here: megatron-core's function that copies stands for it."""
    happened: list[tuple[object, ...]] = []

    def copy() -> str:
        happened.append(("copied in", threading.current_thread().name))
        return "copies on the host"

    def write(*arguments: object) -> None:
        happened.append((*arguments, "in", threading.current_thread().name))

    request = {"async_fn": write, "async_fn_args": (0, "tensors on the device", "queue"), "preload_fn": copy}
    writers = _writers(monkeypatch, tmp_path, **request)
    BackgroundWork(writers.write, "checkpoint").result()
    assert happened == [
        ("copied in", threading.current_thread().name),
        (0, "copies on the host", "queue", "in", "checkpoint"),
    ]


def test_a_rank_that_has_nothing_to_write_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _writers(monkeypatch, tmp_path, async_fn=None, async_fn_args=()).write()


def test_what_ends_the_thread_is_raised_where_somebody_sees_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no memory for a thread")

    writers = _writers(monkeypatch, tmp_path, async_fn=fail, async_fn_args=(0, [], None))
    work = BackgroundWork(writers.write)
    with pytest.raises(MemoryError, match="no memory for a thread"):
        work.result()
    assert work.is_done()
