"""A run whose processes were killed goes on from the memory of its hosts, bit for bit as from the disk."""

from __future__ import annotations

import math
import shutil
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spikingbrain_train.checkpoint.between_hosts import Exchange, neighbour_of
from spikingbrain_train.checkpoint.memory_shard import seal, write_tensors
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import CheckpointConfig, MemoryCopies, Precision, Resume, RunConfig
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning import memory_copies
from spikingbrain_train.planning.memory_copies import check_room, is_in_memory
from spikingbrain_train.storage.checkpoint_folder import iterations, set_latest_iteration
from spikingbrain_train.storage.memory_folder import RUN_ID_FILE, MemoryFolder, folder_of, run_id
from spikingbrain_train.training.callbacks.callback import Callback
from tests.checkpoint.saved_runs import ONE_RANK, checkpoint_of, saving_config
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import MODEL, MODEL_76B


class _Killed(Exception):
    """Stands for the end of a process that can do nothing about it."""


class _Dies(Callback):
    def __init__(self, at: int) -> None:
        self._at = at

    def step_begin(self) -> None:
        if self.run.state.iteration == self._at:
            self.run.checkpoints.memory._work.result()  # which a process killed at once may not have done
            raise _Killed


def _train(groups: ProcessGroups, configs: list[RunConfig], dies_at: int | None = None) -> int:
    """Train to the end, or until the process is killed; returns the iteration that it went on from."""
    from spikingbrain_train.training.trainer import Trainer

    trainer = Trainer(configs[groups.rank], groups, [] if dies_at is None else [_Dies(dies_at)])
    begins = trainer.state.iteration
    with suppress(_Killed):
        trainer.train()
    return begins


def _hosts(config: RunConfig, memory: Path, ranks: int) -> list[RunConfig]:
    """The run as each of its ranks sees it: every rank on a host of its own."""
    found = []
    for rank in range(ranks):
        (memory / str(rank)).mkdir(parents=True, exist_ok=True)
        found.append(
            replace(
                config,
                checkpoint=replace(
                    config.checkpoint,
                    memory_folder=str(memory / str(rank)),
                    memory_copies=MemoryCopies.neighbour,
                ),
            )
        )
    return found


def _same(one: Path, other: Path) -> None:
    first, second = MegatronCheckpointReader(one), MegatronCheckpointReader(other)
    assert set(first.tensors) == set(second.tensors)
    for name in first.tensors:
        assert torch.equal(first.read(name), second.read(name)), name


TOPOLOGIES: dict[str, tuple[ModelConfig, Precision, ParallelConfig]] = {
    "DP 2, distributed optimizer": (MODEL, Precision.bf16, ParallelConfig(use_distributed_optimizer=True)),
    "TP 2": (MODEL, Precision.fp32, ParallelConfig(tensor_model_parallel_size=2)),
    "PP 2": (MODEL, Precision.bf16, ParallelConfig(pipeline_model_parallel_size=2)),
    "EP 2": (
        MODEL_76B,
        Precision.fp32,
        ParallelConfig(expert_model_parallel_size=2, use_distributed_optimizer=True),
    ),
}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_run_goes_on_without_the_disk_also_where_a_host_is_lost(
    topology: str, ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    model, precision, parallel = TOPOLOGIES[topology]
    whole = saving_config(tmp_path / "whole", text, 6, model=model, parallel=parallel, save_interval=100)
    whole.precision = precision
    ranks.run(_train, [whole] * 2, world_size=2, parallel=parallel)
    killed = replace(whole, output_dir=str(tmp_path / "killed"))
    killed.checkpoint = replace(whole.checkpoint, memory_interval=2)
    hosts = _hosts(killed, tmp_path / "memory", 2)
    assert ranks.run(_train, hosts, 5, world_size=2, parallel=parallel) == [0, 0]
    assert iterations(tmp_path / "killed" / "checkpoints") == []
    shutil.rmtree(tmp_path / "memory" / "1")
    (tmp_path / "memory" / "1").mkdir()
    must = [replace(each, checkpoint=replace(each.checkpoint, resume=Resume.must)) for each in hosts]
    assert ranks.run(_train, must, world_size=2, parallel=parallel) == [4, 4]
    _same(checkpoint_of(tmp_path / "whole", 6), checkpoint_of(tmp_path / "killed", 6))
    assert [list(each.iterdir()) for each in (tmp_path / "memory").iterdir()] == [[], []]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def test_what_cannot_be_gone_on_from_is_not(ranks: RankPool, tmp_path: Path, text: Path) -> None:
    """Damaged copies, older ones than the disk, another topology, other settings, a run set back."""
    config = saving_config(tmp_path / "run", text, 9, save_interval=2, memory_interval=5)
    hosts = _hosts(config, tmp_path / "memory", 2)
    assert ranks.run(_train, hosts, 5, world_size=2, parallel=ONE_RANK) == [0, 0]
    kept = tmp_path / "kept"
    for name in ("run", "memory"):
        shutil.copytree(tmp_path / name, kept / name)

    def begins(changed: list[RunConfig] | None = None, *, world_size: int = 2) -> int | str:
        """Where the run goes on; it dies there, and all is as it was."""
        found = ranks.run(_begins, changed or hosts, world_size=world_size, parallel=ONE_RANK)
        for name in ("run", "memory"):
            shutil.rmtree(tmp_path / name)
            shutil.copytree(kept / name, tmp_path / name)
        assert len(set(found)) == 1
        return found[0]

    def tensors(host: int) -> list[Path]:
        found = sorted((tmp_path / "memory" / str(host)).rglob("iter_0000005/state.safetensors"))
        assert len(found) == 2  # its own, and its neighbour's
        return found

    assert begins() == 5
    for path in tensors(0):
        if ".copy" not in str(path):
            _flip(path)
    assert begins() == 5  # from the neighbour's copy
    for host in (0, 1):
        for path in tensors(host):
            if "rank_00000" in str(path):
                _flip(path)
    assert begins() == 4
    for path in tensors(1):
        path.with_name("state.pt").write_bytes(b"")
    for path in tensors(0):
        path.with_name("manifest.json").unlink()
    assert begins() == 4
    assert begins([replace(each, optimizer=replace(each.optimizer, lr=3e-3)) for each in hosts]) == 4
    assert begins(world_size=1) == 4
    (tmp_path / "run" / RUN_ID_FILE).write_text("0" * 32)  # another run's
    assert begins() == 4
    set_latest_iteration(tmp_path / "run" / "checkpoints", 2)  # by a user who wants to go back
    assert begins() == 2
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # or to start anew
    assert begins() == 0


def test_copies_that_a_start_does_not_use_are_not_there_for_the_next_one(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    """Those of ranks that are elsewhere now, such as hold NaN, of a run started anew or without copies."""
    config = saving_config(tmp_path / "run", text, 9, save_interval=4, memory_interval=5)
    hosts = _hosts(config, tmp_path / "memory", 2)
    assert ranks.run(_train, hosts, 5, world_size=2, parallel=ONE_RANK) == [0, 0]
    kept = shutil.copytree(tmp_path / "memory", tmp_path / "kept")
    [own] = (tmp_path / "memory" / "0").rglob("rank_00000/iter_0000005")
    elsewhere = shutil.copytree(own, own.parents[1] / "rank_00002" / own.name)
    assert ranks.run(_begins, hosts, world_size=2, parallel=ONE_RANK) == [5, 5]
    assert own.exists() and not elsewhere.exists()

    def begins(**checkpoint: Any) -> list[int | str]:
        changed = [replace(each, checkpoint=replace(each.checkpoint, **checkpoint)) for each in hosts]
        found = ranks.run(_begins, changed, world_size=2, parallel=ONE_RANK)
        assert not list((tmp_path / "memory").rglob("state.safetensors"))
        shutil.copytree(kept, tmp_path / "memory", dirs_exist_ok=True)
        return found

    for path in list((tmp_path / "memory").rglob("iter_0000005/state.safetensors")):
        _spoil(path)
    assert begins() == [4, 4]
    assert begins(memory_interval=0) == [4, 4]
    [of_one] = (tmp_path / "memory" / "1").rglob("rank_00001/iter_0000005/state.pt")
    of_one.write_bytes(b"no state")  # which its checksum does not tell
    seal(of_one.parent)
    assert begins() == [4, 4]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert begins(resume=Resume.never) == [0, 0]
    refused = begins(resume=Resume.must)  # the copies knew of a checkpoint on the disk
    assert "no copies in memory can be used and checkpoint.resume=must" in str(refused[0])
    assert refused[0] == refused[1]


def _spoil(path: Path) -> None:
    """Let a rank have kept NaN."""
    tensors = load_file(path)
    spoiled = {name: each * math.nan for name, each in tensors.items() if name.endswith(".exp_avg")}
    assert spoiled
    write_tensors(path, {name: spoiled.get(name, each) for name, each in tensors.items()})
    seal(path.parent)


def _begins(groups: ProcessGroups, configs: list[RunConfig]) -> int | str:
    """The iteration that a run goes on from, or why it does not."""
    from spikingbrain_train.training.trainer import Trainer

    try:
        return Trainer(configs[groups.rank], groups).state.iteration
    except CheckpointError as error:
        return str(error)


def test_a_shard_is_a_safetensors_file_whose_memory_is_used_again(tmp_path: Path) -> None:
    first: dict[str, Any] = {
        "a": torch.randn(3, 5).t(),
        "b": torch.arange(7, dtype=torch.uint8),
        "c": torch.tensor(2.5, dtype=torch.bfloat16),
        "d": torch.empty(0, 4),
    }
    path = tmp_path / "state.safetensors"
    for tensors in (first, {name: tensor * 2 for name, tensor in first.items()}):
        before = path.stat().st_ino if path.exists() else None
        write_tensors(path, tensors)
        assert before in (None, path.stat().st_ino)
        found = load_file(path)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_copies_lie_on_the_next_host_where_there_are_several() -> None:
    assert [neighbour_of(rank, 8, 4) for rank in range(8)] == [4, 5, 6, 7, 0, 1, 2, 3]
    assert [neighbour_of(rank, 3, 3) for rank in range(3)] == [1, 2, 0]


def test_leftovers_of_other_runs_in_the_folder_are_told_from_ones_own(tmp_path: Path) -> None:
    output = tmp_path / "run"
    number = run_id(str(output))
    assert run_id(str(output)) == number
    mine = MemoryFolder(str(tmp_path), str(output), number)
    other = MemoryFolder(str(tmp_path), str(output), "0" * 32)
    elsewhere = MemoryFolder(str(tmp_path), str(tmp_path / "other"), number)
    for each in (mine, other, elsewhere):
        each.shard(0, 4).mkdir(parents=True)
    assert mine.remove_others() == ["0" * 32]
    assert [shard.iteration for shard in mine.shards()] == [4] and not other.shards()
    mine.remove()
    assert elsewhere.shards() and not folder_of(str(tmp_path), str(output)).exists()


def test_copies_without_room_are_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(
        output_dir=str(tmp_path / "run"),
        checkpoint=CheckpointConfig(memory_interval=5, memory_folder=str(tmp_path)),
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Room())
    check_room(config, 0.5e9, 2, 2)
    for ranks_here, bytes_here in (
        (2, 0.6e9),
        (1, 0.3e9),
    ):  # on two hosts there are copies for the other, too
        with pytest.raises(ConfigurationError, match=r"memory_interval=5 takes about .* GiB free; set"):
            check_room(config, bytes_here, 2, ranks_here)
    monkeypatch.setattr(memory_copies, "memory_free", lambda: 1 << 29)  # less than the folder may take
    check_room(config, 0.25e9, 2, 2)
    check_room(config, 0.5e9, 2, 2)  # on a disk
    monkeypatch.setattr(memory_copies, "is_in_memory", lambda folder: str(folder) == str(tmp_path))
    check_room(config, 0.25e9, 2, 2)
    for bytes_here, beside, said in (
        (0.3e9, 0.0, "of memory but"),
        (0.25e9, 0.2e9, "and the run 0.2 GiB, but"),
    ):
        with pytest.raises(
            ConfigurationError, match=rf"takes about .* {said} this machine, or its container"
        ):
            check_room(config, bytes_here, 2, 2, beside=beside)
    config.checkpoint.memory_folder = str(tmp_path / "absent")
    with pytest.raises(ConfigurationError, match="is no folder that can be written"):
        check_room(config, 1.0, 2, 2)


def test_a_folder_is_in_memory_where_the_innermost_mount_is(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    rows = ["/dev/sda / ext4", "shm /dev/shm tmpfs", "/dev/sdb /dev/shm/disk ext4", "none /a\\040b ramfs"]
    mounts.write_text("".join(f"{row} rw 0 0\n" for row in rows))
    in_memory = [is_in_memory(Path(each), mounts) for each in ("/dev/shm", "/dev/shm/x", "/a b/c")]
    elsewhere = [is_in_memory(Path(each), mounts) for each in ("/", "/dev/shmx", "/dev/shm/disk/x")]
    assert all(in_memory) and not any(elsewhere)
    assert not is_in_memory(Path("/dev/shm"), tmp_path / "absent")


class _Room:
    free = 1 << 30


def _pass_on(groups: ProcessGroups, folder: Path) -> str:
    """Send each other a file; what is received is whole where this returns nothing."""
    exchange = Exchange(torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=20)))
    own, received = folder / f"own{groups.rank}", folder / f"received{groups.rank}"
    other = 1 - groups.rank
    try:
        exchange.pass_on(own, other, received, other)
        assert (received / "state").read_bytes() == bytes([other]) * 5
    except OSError as error:
        return type(error).__name__
    return ""


@pytest.mark.parametrize("fails_at", ["reading", "writing"])
def test_a_rank_whose_files_fail_keeps_no_other_waiting(
    fails_at: str, ranks: RankPool, tmp_path: Path
) -> None:
    for rank in (0, 1):
        (tmp_path / f"received{rank}").mkdir()
        (tmp_path / f"own{rank}").mkdir()
        (tmp_path / f"own{rank}" / "state").write_bytes(bytes([rank]) * 5)
    if fails_at == "writing":
        (tmp_path / "received1" / "state").mkdir()
        expected = ["", "IsADirectoryError"]
    else:
        shutil.rmtree(tmp_path / "own1")
        (tmp_path / "own1").write_bytes(b"")
        expected = ["FileNotFoundError", "NotADirectoryError"]  # nothing has come, so there is nothing
    assert ranks.run(_pass_on, tmp_path, world_size=2, parallel=ONE_RANK) == expected
