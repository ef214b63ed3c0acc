"""A checkpoint that lies there is good, and no run spoils the one that it could go back to."""

from __future__ import annotations

import errno
import json
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.numerics import OnBadBatch
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import Resume, RunConfig
from spikingbrain_train.errors import CheckpointError, ConfigurationError, NumericalError
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.runtime.checkpoint_metadata import WHOLE_FILES, read_metadata, shard_ranges
from spikingbrain_train.storage.checkpoint_folder import (
    LATEST_ITERATION_FILE,
    iterations,
    latest_iteration,
    set_latest_iteration,
)
from spikingbrain_train.storage.checkpoint_manifest import MANIFEST_FILE
from spikingbrain_train.training.callbacks.callback import Callback
from tests.checkpoint.saved_runs import ONE_RANK, checkpoint_of, outcome, saving_config
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import (
    MODEL,
    MODEL_76B,
    behind_gradients,
    train,
)


def _train_without_forks(groups: ProcessGroups, config: RunConfig) -> int:
    def refuse() -> int:
        raise AssertionError("a fork copies the locks of threads that it does not copy")

    fork, os.fork = os.fork, refuse
    try:
        return len(train(groups, config))
    finally:
        os.fork = fork


def test_saving_forks_no_process_beside_the_threads_of_a_run(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    config = saving_config(tmp_path, text, train_iters=4)
    assert ranks.run(_train_without_forks, config, world_size=1, parallel=ONE_RANK) == [4]
    assert iterations(tmp_path / "checkpoints") == [2, 4]


# Not finite


def _with_a_gradient_spoiled_on_the_last_rank(
    groups: ProcessGroups, config: RunConfig, step: int
) -> tuple[str, str, bool]:
    """Outcome, and whether the weights are those from before the step."""
    from spikingbrain_train.training.trainer import Trainer

    before: list[torch.Tensor] = []

    def spoil() -> None:
        if trainer.state.iteration + 1 == step:
            parameters = list(trainer.state.data_parallel.parameters())
            before.extend(parameter.detach().clone() for parameter in parameters)
            if groups.rank == groups.world_size - 1:
                experts = [p for p in parameters if not getattr(p, "allreduce", True)]
                split = [p for p in parameters if getattr(p, "tensor_model_parallel", False)]
                parameter = (experts or split)[0]
                parameter.main_grad.view(-1)[0] = float("nan")

    trainer = Trainer(config, groups)
    behind_gradients(trainer, spoil)
    try:
        trainer.train()
    except NumericalError as error:
        same = all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
        return type(error).__name__, str(error), same
    return "", "", False


@pytest.mark.parametrize(
    ("world_size", "parallel", "model"),
    [
        (1, ONE_RANK, MODEL),
        (2, ParallelConfig(tensor_model_parallel_size=2), MODEL),
        (2, ParallelConfig(pipeline_model_parallel_size=2, use_distributed_optimizer=True), MODEL),
        (2, ParallelConfig(expert_model_parallel_size=2), MODEL_76B),
    ],
    ids=["one rank", "TP 2", "PP 2, distributed optimizer", "EP 2"],
)
def test_a_gradient_that_is_not_finite_updates_nothing_on_any_rank(
    world_size: int, parallel: ParallelConfig, model, ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    config = saving_config(
        tmp_path, text, train_iters=4, save_interval=1, keep_last=1, model=model, parallel=parallel
    )
    config.numerics.on_bad_batch = OnBadBatch.stop
    outcomes = ranks.run(
        _with_a_gradient_spoiled_on_the_last_rank, config, 4, world_size=world_size, parallel=parallel
    )
    for kind, sentence, weights_are_untouched in outcomes:
        assert kind == "NumericalError" and weights_are_untouched
        assert "the gradient norm became nan at iteration 4" in sentence
        assert f"go on from {checkpoint_of(tmp_path, 3)}" in sentence
    assert iterations(tmp_path / "checkpoints") == [3]


def _with_a_moment_spoiled_in_the_last_step(groups: ProcessGroups, config: RunConfig) -> tuple[str, str]:
    from spikingbrain_train.training.trainer import Trainer

    class Spoil(Callback):
        def step_end(self) -> None:
            if self.run.is_last_step and groups.rank == groups.world_size - 1:
                state = self.run.state.optimizer.chained_optimizers[0].optimizer.state
                next(iter(state.values()))["exp_avg"].view(-1)[0] = float("nan")

    try:
        Trainer(config, groups, [Spoil()]).train()
    except NumericalError as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize("distributed_optimizer", [False, True], ids=["plain", "distributed optimizer"])
def test_what_is_not_finite_is_not_saved_even_in_the_last_step(
    distributed_optimizer: bool, ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    parallel = ParallelConfig(use_distributed_optimizer=distributed_optimizer)
    config = saving_config(tmp_path, text, train_iters=3, save_interval=1, keep_last=1, parallel=parallel)
    outcomes = ranks.run(_with_a_moment_spoiled_in_the_last_step, config, world_size=2, parallel=parallel)
    for kind, sentence in outcomes:
        assert kind == "NumericalError"
        assert "iteration 3 is not saved" in sentence and "rank 1: exp_avg of the optimizer" in sentence
        assert f"go on from {checkpoint_of(tmp_path, 2)}" in sentence
    assert iterations(tmp_path / "checkpoints") == [2]
    assert latest_iteration(tmp_path / "checkpoints") == 2


def _save_a_moment_that_is_not_finite(groups: ProcessGroups, config: RunConfig) -> None:
    """As an earlier version of this project would have saved it."""
    from spikingbrain_train.checkpoint import saving

    check = saving.first_not_finite_of_run
    saving.first_not_finite_of_run = lambda *_: None
    try:
        _with_a_moment_spoiled_in_the_last_step(groups, config)
    finally:
        saving.first_not_finite_of_run = check


def test_a_checkpoint_that_is_not_finite_is_not_resumed_from_and_the_good_one_is_named(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    config = saving_config(tmp_path, text, train_iters=4, save_interval=2)
    ranks.run(_save_a_moment_that_is_not_finite, config, world_size=1, parallel=ONE_RANK)
    config.stage = replace(config.stage, train_iters=6)
    config.checkpoint.keep_last = 1
    [(kind, sentence)] = ranks.run(outcome, config, world_size=1, parallel=ONE_RANK)
    assert kind == "DamagedCheckpointError"
    assert "iter_0000004 holds NaN or infinity (exp_avg of the optimizer)" in sentence
    assert f"{checkpoint_of(tmp_path, 2)} is complete: write 2 into" in sentence
    assert iterations(tmp_path / "checkpoints") == [2, 4]


def _with_an_evaluation_that_is_not_finite(groups: ProcessGroups, config: RunConfig) -> tuple[str, str]:
    from spikingbrain_train.evaluation import held_out

    evaluate = held_out.held_out_cross_entropy
    held_out.held_out_cross_entropy = lambda model, *_, **__: held_out.HeldOutLosses(
        float("nan") if model.training else 0.0, []
    )
    try:
        return outcome(groups, config)
    finally:
        held_out.held_out_cross_entropy = evaluate


def test_a_held_out_loss_that_is_not_finite_ends_the_run(ranks: RankPool, tmp_path: Path, text: Path) -> None:
    config = saving_config(tmp_path, text, train_iters=3)
    config.data = replace(config.data, valid=[str(text)])
    [(kind, sentence)] = ranks.run(
        _with_an_evaluation_that_is_not_finite, config, world_size=1, parallel=ONE_RANK
    )
    assert kind == "NumericalError" and "the held-out cross entropy became nan at iteration 0" in sentence
    assert "no step has changed the weights yet" in sentence and "optimizer.lr" not in sentence


# Damage


def _flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << position % 8]))


def _sentence_of_loading(groups: ProcessGroups, checkpoint: Path, optimizer_too: bool) -> str:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from spikingbrain_train.checkpoint.torch_dist import load_shards

    keys = ["decoder.any"] + ["optimizer.any"] * optimizer_too
    try:
        load_shards({key: ShardedTensor.from_rank_offsets(key, torch.zeros(1)) for key in keys}, checkpoint)
    except CheckpointError as error:
        return str(error)
    except Exception:  # no checkpoint has such keys
        return ""
    return ""


def test_every_flipped_bit_of_a_shard_is_found(ranks: RankPool, run: Path) -> None:
    """Headers and padding between the numbers included."""
    generator = random.Random(5)
    checkpoint = checkpoint_of(run, 6)
    shards = sorted(checkpoint.glob("*.distcp"))
    for _ in range(8):
        shard = generator.choice(shards)
        position = generator.randrange(shard.stat().st_size)
        _flip(shard, position)
        sentences = ranks.run(_sentence_of_loading, checkpoint, True, world_size=2, parallel=ONE_RANK)
        assert sentences[0] == sentences[1]
        assert f"{shard} is damaged or of another save" in sentences[0]
        _flip(shard, position)


def test_weights_are_read_where_only_optimizer_states_are_damaged(ranks: RankPool, run: Path) -> None:
    checkpoint = checkpoint_of(run, 6)
    ranges = shard_ranges(read_metadata(checkpoint))
    weights = shard_ranges(read_metadata(checkpoint), skip=("optimizer.",))
    name, [(offset, _), *_] = next(
        (name, left) for name in ranges if (left := sorted(set(ranges[name]) - set(weights.get(name, []))))
    )
    _flip(checkpoint / name, offset + 100)
    for optimizer_too, damaged in ((False, False), (True, True)):
        [sentence] = ranks.run(
            _sentence_of_loading, checkpoint, optimizer_too, world_size=1, parallel=ONE_RANK
        )
        assert ("is damaged" in sentence) is damaged


def test_the_reader_of_the_tools_names_a_damaged_shard(run: Path) -> None:
    checkpoint = checkpoint_of(run, 6)
    for shard in checkpoint.glob("*.distcp"):
        _flip(shard, shard.stat().st_size // 2)
    reader = MegatronCheckpointReader(checkpoint)
    with pytest.raises(CheckpointError, match=r"distcp is damaged or of another save"):
        for name in reader.tensors:
            reader.read(name)


# Which checkpoint a run goes on from


def test_a_lost_tracker_goes_on_from_the_newest_complete_folder(
    ranks: RankPool, run: Path, text: Path
) -> None:
    (run / "checkpoints" / LATEST_ITERATION_FILE).unlink()
    (checkpoint_of(run, 6) / ".metadata").unlink()
    config = saving_config(run, text, train_iters=5, save_interval=0)
    assert ranks.run(outcome, config, world_size=2, parallel=ONE_RANK) == [("", "1")] * 2
    assert latest_iteration(run / "checkpoints") == 5
    assert checkpoint_of(run, 6).with_name("iter_0000006.superseded").is_dir()


def test_resume_never_counts_folders_without_a_tracker(ranks: RankPool, run: Path, text: Path) -> None:
    (run / "checkpoints" / LATEST_ITERATION_FILE).unlink()
    config = saving_config(run, text, train_iters=8, resume=Resume.never)
    [(kind, sentence)] = ranks.run(outcome, config, world_size=1, parallel=ONE_RANK)
    assert kind == "ConfigurationError" and "already holds iteration 6" in sentence
    assert iterations(run / "checkpoints") == [2, 4, 6]


def test_going_back_keeps_what_is_saved_after_and_what_was_saved_before(
    ranks: RankPool, run: Path, text: Path
) -> None:
    set_latest_iteration(run / "checkpoints", 2)
    config = saving_config(run, text, train_iters=5, save_interval=1, keep_last=1)
    assert ranks.run(outcome, config, world_size=1, parallel=ONE_RANK) == [("", "3")]
    assert sorted(path.name for path in (run / "checkpoints").glob("iter_*")) == [
        "iter_0000004.superseded",
        "iter_0000005",
        "iter_0000006.superseded",
    ]
    assert latest_iteration(run / "checkpoints") == 5


# Writing


def _with_a_full_disk_on_rank_1(groups: ProcessGroups, config: RunConfig) -> tuple[str, str]:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_item = filesystem_async._write_item
    if groups.rank == 1:
        filesystem_async._write_item = full
    try:
        return outcome(groups, config)
    finally:
        filesystem_async._write_item = write_item


def test_a_full_disk_on_one_rank_is_the_same_sentence_on_all(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    config = saving_config(tmp_path, text, train_iters=3, parallel=parallel)
    outcomes = ranks.run(_with_a_full_disk_on_rank_1, config, world_size=2, parallel=parallel)
    assert outcomes[0] == outcomes[1]
    kind, sentence = outcomes[0]
    assert kind == "CheckpointError"
    # 0.19 keeps the kind of the error only.
    assert re.search(
        r"cannot be written \(rank 1: .*(\[Errno 28\] No space left on device|OSError)", sentence
    )
    assert list((tmp_path / "checkpoints").iterdir()) == []


def _out_of_memory_on_rank_1(groups: ProcessGroups, config: RunConfig, message: str) -> tuple[str, str]:
    from spikingbrain_train.checkpoint import saving

    def allocate(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(message)

    checksums_of_rank = saving.checksums_of_rank
    if groups.rank == 1:
        saving.checksums_of_rank = allocate
    try:
        return outcome(groups, config)
    except torch.OutOfMemoryError as error:
        return type(error).__name__, str(error)
    finally:
        saving.checksums_of_rank = checksums_of_rank


def test_what_the_disk_is_not_to_blame_for_is_raised_where_it_happened_and_ends_all_ranks(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    config = saving_config(tmp_path, text, train_iters=3)
    message = "CUDA out of memory. Tried to allocate 2.00 GiB."
    [(other, sentence), own] = ranks.run(
        _out_of_memory_on_rank_1, config, message, world_size=2, parallel=ONE_RANK
    )
    assert own == ("OutOfMemoryError", message)
    assert other == "CheckpointError" and f"because of rank 1: {message}" in sentence
    assert "free space" not in sentence
    assert list((tmp_path / "checkpoints").iterdir()) == []


def _run_to_the_end(config: RunConfig) -> str:
    from spikingbrain_train.training.trainer import run

    try:
        run(config)
    except ConfigurationError as error:
        return str(error)
    return ""


def test_a_second_run_in_a_folder_is_refused_and_touches_nothing(
    ranks: RankPool, run: Path, text: Path
) -> None:
    from spikingbrain_train.storage.run_lock import run_lock

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with run_lock(run):
        config = saving_config(run, text, train_iters=8)
        sentences = ranks.run(_run_to_the_end, config, world_size=2)
    assert sentences[0] == sentences[1]
    assert f"output_dir={run} is in use by another run (process {os.getpid()}" in sentences[0]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path != run} == {
        path: time for path, time in before.items() if path != run
    }
    assert ranks.run(_run_to_the_end, config, world_size=1) == [""]
    assert latest_iteration(run / "checkpoints") == 8


def test_all_files_of_a_checkpoint_are_in_its_manifest(finished: Path) -> None:
    checkpoint = checkpoint_of(finished, 6)
    manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
    listed = manifest["files"]
    assert {*listed, *manifest["beside"], MANIFEST_FILE} == {
        path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()
    }
    assert set(listed) == {path.name for path in checkpoint.glob("*.distcp")} | set(WHOLE_FILES)
    for name, parts in listed.items():
        assert sum(length for _, length, _ in parts) == (checkpoint / name).stat().st_size
