"""write -> verify -> commit: whatever fails, and when, the old checkpoint or the new one is there."""

from __future__ import annotations

import errno
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spikingbrain_train.checkpoint import saving, torch_dist
from spikingbrain_train.checkpoint.host_copies import HostCopies
from spikingbrain_train.checkpoint.saving import FilesBesideWeights, PendingSave, Phase, save_checkpoint
from spikingbrain_train.checkpoint.torch_dist import load_shards
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.run_record import RunRecord
from spikingbrain_train.errors import CheckpointError, NumericalError
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.storage.checkpoint_folder import (
    incomplete_folder,
    is_complete,
    iteration_folder,
    iterations,
    latest_checkpoint,
    latest_iteration,
    newest_iteration,
)
from spikingbrain_train.storage.checkpoint_manifest import MANIFEST_FILE
from tests.distributed.pool import RankFailure, RankPool
from tests.distributed.small_runs import MODEL

PARALLEL = ParallelConfig()
FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
BESIDE = FilesBesideWeights(RunConfig(model=MODEL, output_dir="run"), RunRecord(2, []), None)


def _rows(groups: ProcessGroups, iteration: int) -> torch.Tensor:
    """This rank's rows of the weights of an iteration."""
    whole = torch.arange(24.0).reshape(4, 6) + iteration
    return whole.chunk(groups.world_size)[groups.rank].clone()


@dataclass
class _Stage:
    """A model of one parameter, whose rows the ranks share."""

    weight: torch.Tensor
    groups: ProcessGroups
    model_config: Any = field(default_factory=lambda: MODEL)

    def named_parameters(self):
        return [("weight", self.weight)]

    def parameters(self):
        return [self.weight]

    def buffers(self):
        return []

    def sharded_state_dict(self, *, metadata):
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        offset = (0, self.groups.rank, self.groups.world_size)
        return {"weight": ShardedTensor.from_rank_offsets("weight", self.weight, offset)}


def _state(groups: ProcessGroups, iteration: int) -> Any:
    stage = _Stage(_rows(groups, iteration), groups)
    return SimpleNamespace(
        model=stage,
        learnt_to_save=lambda: {"model": stage.sharded_state_dict(metadata={}), "optimizer": {}},
        optimizer=SimpleNamespace(chained_optimizers=[]),
        callbacks=SimpleNamespace(state_dict=dict),
        scheduler=SimpleNamespace(state_dict=lambda: {"num_steps": iteration}),
        iteration=iteration,
        consumed_samples=4 * iteration,
        gather_updated_weights=lambda: None,
    )


def _check_newest(groups: ProcessGroups, folder: Path, iteration: int) -> None:
    """The checkpoint that a run would go on from is that of ``iteration``, to the last bit."""
    assert newest_iteration(folder) == latest_iteration(folder) == iteration
    checkpoint = latest_checkpoint(folder, "folder")
    assert is_complete(checkpoint)
    stage = _Stage(torch.zeros_like(_rows(groups, iteration)), groups)
    loaded = load_shards({"model": stage.sharded_state_dict(metadata={})}, checkpoint)
    assert torch.equal(loaded["model"]["weight"], _rows(groups, iteration))
    assert loaded["iteration"] == iteration and loaded["scheduler"] == {"num_steps": iteration}


# Phases


def _watch_the_phases(groups: ProcessGroups, folder: Path) -> list[bool]:
    """Rank 1 is slow, and the state changes while it writes; returns whether this rank was still working."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    save_checkpoint(folder, _state(groups, 2), BESIDE, groups)
    may_write, write_item = threading.Event(), filesystem_async._write_item

    @functools.wraps(write_item)  # whose arguments megatron-core looks at
    def write_when_told(*arguments: object, **options: object) -> object:
        may_write.wait(60)
        return write_item(*arguments, **options)

    if groups.rank == 1:
        filesystem_async._write_item = write_when_told
    state, working = _state(groups, 4), []
    try:
        save = PendingSave.begin(folder, state, BESIDE, groups, HostCopies(state.model, state.optimizer))
        state.model.weight.fill_(-1)  # as a step would
        working.append(groups.rank == 1 and save.is_working())
        assert save.phase is Phase.writing and iterations(folder) == [2]
        torch.distributed.barrier()
        may_write.set()
        assert save.advance() is None
    finally:
        filesystem_async._write_item = write_item
    temporary = incomplete_folder(iteration_folder(folder, 4))
    assert save.phase is Phase.verifying and not (temporary / MANIFEST_FILE).exists()
    _check_newest(groups, folder, 2)
    assert save.advance() is None
    assert save.phase is Phase.committing and latest_iteration(folder) in (2, 4)
    assert save.advance() == iteration_folder(folder, 4)
    assert save.phase is Phase.committed and not save.is_working()
    _check_newest(groups, folder, 4)
    with pytest.raises(AssertionError, match="the checkpoint is the newest"):
        save.advance()
    return working


def test_a_run_goes_on_while_its_copies_are_written_and_the_old_checkpoint_is_in_force_until_they_are(
    ranks: RankPool, tmp_path: Path
) -> None:
    working = ranks.run(_watch_the_phases, tmp_path, world_size=2, parallel=PARALLEL)
    assert working == [[False], [True]]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000002",
        "iter_0000004",
        "latest_checkpointed_iteration.txt",
    ]


# Failures on one rank


@contextmanager
def _replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def _full_disk_while_writing() -> Any:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    return _replaced(filesystem_async, "_write_item", _raising(FULL_DISK))


@contextmanager
def _shards_change_before_they_are_verified(change: Callable[[Path], None]) -> Iterator[None]:
    checksums_of_rank = saving.checksums_of_rank

    def and_then_change(folder: Path) -> Any:
        found = checksums_of_rank(folder)
        for shard in folder.glob("__1_*.distcp"):
            change(shard)
        return found

    with _replaced(saving, "checksums_of_rank", and_then_change):
        yield


def _cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


# Where it fails: the rank, what goes wrong there, and the words of the sentence on every rank.
FAILURES: dict[str, tuple[int, Callable[[], Any], str]] = {
    "begin: no folder can be made": (
        0,
        lambda: _replaced(saving, "remove_incomplete", _raising(PermissionError(13, "Permission denied"))),
        "cannot be written (rank 0: [Errno 13] Permission denied); free space",
    ),
    "begin: a rank has no state": (
        1,
        lambda: _replaced(saving, "state_to_save", _raising(RuntimeError("a tensor is gone"))),
        "a tensor is gone",
    ),
    "begin: the full disk takes no config": (
        0,
        lambda: _replaced(saving, "save_config", _raising(FULL_DISK)),
        "cannot be written (rank 0: [Errno 28] No space left on device); free space",
    ),
    "write: the disk is full for a rank": (1, _full_disk_while_writing, "cannot be written (rank 1: "),
    "write: the writers of a rank die": (
        1,
        lambda: _replaced(
            torch_dist.ShardWriters,
            "write",
            _raising(RuntimeError("a writer is gone")),
        ),
        "a writer is gone",
    ),
    "verify: a rank cannot read what it wrote": (
        1,
        lambda: _replaced(saving, "checksums_of_rank", _raising(OSError(errno.EIO, "Input/output error"))),
        "cannot be written (rank 1: [Errno 5] Input/output error); free space",
    ),
    "verify: a shard is shorter than it was": (
        1,
        lambda: _shards_change_before_they_are_verified(_cut),
        "cannot be written (rank 0: __1_0.distcp has ",
    ),
    "verify: a shard is gone": (
        1,
        lambda: _shards_change_before_they_are_verified(Path.unlink),
        "cannot be written (rank 0: __1_0.distcp was written and is missing)",
    ),
    "commit: the disk fails": (
        0,
        lambda: _replaced(saving, "sync_tree", _raising(OSError(errno.EIO, "Input/output error"))),
        "cannot be written (rank 0: [Errno 5] Input/output error); free space",
    ),
    "commit: the folder cannot be renamed": (
        0,
        lambda: _replaced(saving, "rename_durably", _raising(OSError(errno.EIO, "Input/output error"))),
        "cannot be written (rank 0: [Errno 5] Input/output error); free space",
    ),
    "commit: the pointer cannot be moved": (
        0,
        lambda: _replaced(saving, "set_latest_iteration", _raising(FULL_DISK)),
        "cannot be written (rank 0: [Errno 28] No space left on device); free space",
    ),
}


def _fail_once(groups: ProcessGroups, folder: Path, failure: str) -> tuple[str, str]:
    """Kind and sentence of the failure of iteration 4, which is then written after all."""
    save_checkpoint(folder, _state(groups, 2), BESIDE, groups)
    rank, failing, _ = FAILURES[failure]
    kind, sentence = "", ""
    with failing() if groups.rank == rank else _nothing():
        try:
            save_checkpoint(folder, _state(groups, 4), BESIDE, groups)
        except Exception as error:
            kind, sentence = type(error).__name__, str(error)
    torch.distributed.barrier()
    _check_newest(groups, folder, 2)
    assert not list(folder.glob(".iter_*"))
    torch.distributed.barrier()
    save_checkpoint(folder, _state(groups, 4), BESIDE, groups)
    _check_newest(groups, folder, 4)
    return kind, sentence


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_on_one_rank_is_raised_on_all_and_leaves_the_old_checkpoint_in_force(
    failure: str, ranks: RankPool, tmp_path: Path
) -> None:
    outcomes = ranks.run(_fail_once, tmp_path, failure, world_size=2, parallel=PARALLEL)
    rank, _, words = FAILURES[failure]
    for other, (kind, sentence) in enumerate(outcomes):
        assert words in sentence
        if "cannot be written" in words:
            assert kind == "CheckpointError" and "Earlier checkpoints are untouched" in sentence
        else:  # whoever met it raises it as it is, the others say where
            assert kind == ("RuntimeError" if other == rank else "CheckpointError")
            assert other == rank or f"because of rank {rank}: {words}" in sentence


def _with_nan_on_rank_1(groups: ProcessGroups, folder: Path) -> str:
    save_checkpoint(folder, _state(groups, 2), BESIDE, groups)
    state = _state(groups, 4)
    if groups.rank == 1:
        state.model.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError) as refused:
        PendingSave.begin(folder, state, BESIDE, groups)
    _check_newest(groups, folder, 2)
    return str(refused.value)


def test_what_is_not_finite_is_not_even_begun(ranks: RankPool, tmp_path: Path) -> None:
    for sentence in ranks.run(_with_nan_on_rank_1, tmp_path, world_size=2, parallel=PARALLEL):
        assert "iteration 4 is not saved, because it holds NaN or infinity (rank 1: weight)" in sentence
        assert f"go on from {iteration_folder(tmp_path, 2)}" in sentence
    assert not list(tmp_path.glob(".iter_*"))


# Processes that are killed


class _Killed(BaseException):
    """Nobody handles it: what is left on the disk is what a killed process leaves."""


# Up to which function a save has come, and what it leaves of iteration 4.
CRASHES: dict[str, tuple[Any, str, list[str]]] = {
    "before it writes files": (saving, "ShardWriters", [".iter_0000004.incomplete"]),
    "when this rank's files are written": (PendingSave, "_end_of_writing", [".iter_0000004.incomplete"]),
    "before it is verified": (saving, "checksums_of_rank", [".iter_0000004.incomplete"]),
    "before the manifest": (saving, "write_manifest", [".iter_0000004.incomplete"]),
    "before it is committed": (PendingSave, "_commit", [".iter_0000004.incomplete"]),
    "before it is renamed": (saving, "rename_durably", [".iter_0000004.incomplete"]),
    "between the name and the pointer": (saving, "set_latest_iteration", ["iter_0000004"]),
}


def _crash_once(groups: ProcessGroups, folder: Path, where: str) -> list[str]:
    """What the killed save has left; then another run saves."""
    save_checkpoint(folder, _state(groups, 2), BESIDE, groups)
    owner, function, _ = CRASHES[where]
    with _replaced(owner, function, _raising(_Killed())), pytest.raises(_Killed):
        save_checkpoint(folder, _state(groups, 4), BESIDE, groups)
    _check_newest(groups, folder, 2)
    left = [path.name for path in folder.iterdir() if "0000004" in path.name]
    save_checkpoint(folder, _state(groups, 4), BESIDE, groups)
    _check_newest(groups, folder, 4)
    return left


@pytest.mark.parametrize("where", CRASHES)
def test_a_save_that_is_killed_leaves_the_old_checkpoint_in_force_and_the_next_one_cleans_up(
    where: str, ranks: RankPool, tmp_path: Path
) -> None:
    *_, leaves = CRASHES[where]
    assert ranks.run(_crash_once, tmp_path, where, world_size=1, parallel=PARALLEL) == [leaves]
    assert not list(tmp_path.glob(".iter_*"))
    # A complete one that nobody pointed to is not removed but set aside.
    assert [path.name for path in tmp_path.glob("iter_*.superseded")] == [
        f"{name}.superseded" for name in leaves if name.startswith("iter")
    ]


def _kill_rank_1_while_it_writes(groups: ProcessGroups, folder: Path) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    save_checkpoint(folder, _state(groups, 2), BESIDE, groups)
    if groups.rank == 1:
        filesystem_async._write_item = lambda *_, **__: os._exit(9)
    save_checkpoint(folder, _state(groups, 4), BESIDE, groups)


@pytest.mark.slow
def test_a_rank_that_dies_while_it_writes_leaves_the_old_checkpoint_in_force(
    ranks: RankPool, tmp_path: Path
) -> None:
    with pytest.raises(RankFailure, match="died with exit code 9"):
        ranks.run(_kill_rank_1_while_it_writes, tmp_path, world_size=2, parallel=PARALLEL)
    assert iterations(tmp_path) == [2] and latest_iteration(tmp_path) == 2
    ranks.run(_check_newest, tmp_path, 2, world_size=2, parallel=PARALLEL)


def test_a_folder_that_cannot_be_made_is_one_sentence(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for sentence in ranks.run(_refused, tmp_path / "file" / "checkpoints", world_size=2, parallel=PARALLEL):
        assert f"the checkpoint {tmp_path / 'file' / 'checkpoints'} cannot be written" in sentence


def _refused(groups: ProcessGroups, folder: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        save_checkpoint(folder, _state(groups, 2), BESIDE, groups)
    return str(refused.value)
