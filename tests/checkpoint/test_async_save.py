"""A run that trains while its checkpoints are written saves what one that waits saves."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.numerics import OnBadBatch
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig, WhileSaving
from spikingbrain_train.errors import CheckpointError, NumericalError
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.storage.checkpoint_folder import iteration_folder, iterations, latest_iteration
from spikingbrain_train.training.callbacks.callback import Callback
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import (
    MODEL,
    MODEL_76B,
    behind_gradients,
    checkpoint_config,
    run_config,
    train,
)


def _config(
    folder: Path, text: Path, parallel: ParallelConfig, model: ModelConfig = MODEL, **checkpoint: Any
) -> RunConfig:
    config = run_config(folder, text, model=model, parallel=parallel)
    config.stage = replace(config.stage, train_iters=8)
    config.checkpoint = checkpoint_config(**{"save_interval": 2, **checkpoint})
    return config


@contextmanager
def _slow_writers(seconds: float) -> Iterator[None]:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    write_item = filesystem_async._write_item

    @functools.wraps(write_item)  # whose arguments megatron-core looks at
    def slowly(*arguments: object, **options: object) -> object:
        time.sleep(seconds)
        return write_item(*arguments, **options)

    filesystem_async._write_item = slowly
    try:
        yield
    finally:
        filesystem_async._write_item = write_item


class _Watch(Callback):
    """Notes at every step which checkpoints are pending and complete, and what is said of them."""

    def __init__(self) -> None:
        self.pending_at: list[int] = []
        self.saved_at: dict[str, int] = {}

    def step_begin(self) -> None:
        if self.run.checkpoints.pending is not None:
            self.pending_at.append(self.run.state.iteration)

    def after_save(self, folder: Path) -> None:
        self.saved_at[folder.name] = self.run.state.iteration


def _train_watched(
    groups: ProcessGroups, config: RunConfig, seconds: float
) -> tuple[list[int], dict[str, int]]:
    """Steps that began while a checkpoint was pending, and the step after which each was complete."""
    from spikingbrain_train.training.trainer import Trainer

    watch = _Watch()
    with _slow_writers(seconds):
        Trainer(config, groups, [watch]).train()
    return watch.pending_at, watch.saved_at


def _same(one: Path, other: Path) -> None:
    """Two checkpoints hold the same tensors, to the last bit."""
    first, second = MegatronCheckpointReader(one), MegatronCheckpointReader(other)
    assert set(first.tensors) == set(second.tensors)
    for name in first.tensors:
        assert torch.equal(first.read(name), second.read(name)), name


TOPOLOGIES = {
    "DP 2, distributed optimizer": (MODEL, ParallelConfig(use_distributed_optimizer=True)),
    "TP 2": (MODEL, ParallelConfig(tensor_model_parallel_size=2)),
    "EP 2": (MODEL_76B, ParallelConfig(expert_model_parallel_size=2, use_distributed_optimizer=True)),
}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_checkpoint_is_that_of_a_run_that_waits(
    topology: str, ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    model, parallel = TOPOLOGIES[topology]
    waiting = _config(tmp_path / "waiting", text, parallel, model)
    ranks.run(train, waiting, world_size=2, parallel=parallel)
    going_on = _config(tmp_path / "going_on", text, parallel, model, async_save=True)
    watched = ranks.run(_train_watched, going_on, 0.01, world_size=2, parallel=parallel)
    assert watched[0] == watched[1]
    pending_at, saved_at = watched[0]
    assert {2, 4, 6} <= set(pending_at) and 8 not in pending_at
    assert list(saved_at) == [f"iter_000000{number}" for number in (2, 4, 6, 8)]
    folders = [tmp_path / each / "checkpoints" for each in ("waiting", "going_on")]
    for iteration in (2, 4, 6, 8):
        _same(*(iteration_folder(folder, iteration) for folder in folders))


def test_a_second_save_waits_for_the_first_or_is_left_out(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    one = ParallelConfig()
    waits = _config(tmp_path / "waits", text, one, async_save=True, save_interval=1)
    waits.stage.train_iters = 5
    skips = replace(waits, output_dir=str(tmp_path / "skips"))
    skips.checkpoint = replace(waits.checkpoint, while_saving=WhileSaving.skip)
    # Some 90 tensors: a save takes two seconds, a step a fraction of one.
    [(_, saved_at)] = ranks.run(_train_watched, waits, 0.02, world_size=1, parallel=one)
    assert list(saved_at.values())[:-1] == list(range(2, 6)) and saved_at["iter_0000005"] == 5
    [(_, saved_at)] = ranks.run(_train_watched, skips, 0.02, world_size=1, parallel=one)
    assert "iter_0000001" in saved_at and "iter_0000005" in saved_at and len(saved_at) < 5
    assert iterations(tmp_path / "skips" / "checkpoints") == [int(name[-7:]) for name in saved_at]


def _diverge(groups: ProcessGroups, config: RunConfig) -> str:
    from spikingbrain_train.training.trainer import Trainer

    def spoil() -> None:
        """A gradient is NaN while a checkpoint is pending."""
        if trainer.state.iteration == 2:
            assert trainer.checkpoints.pending == 2
            for parameter in trainer.model.parameters():
                parameter.main_grad.view(-1)[0] = float("nan")

    with _slow_writers(0.01), pytest.raises(NumericalError) as diverged:
        trainer = Trainer(config, groups)
        behind_gradients(trainer, spoil)
        trainer.train()
    return str(diverged.value)


def test_what_was_good_is_finished_when_the_run_diverges(ranks: RankPool, tmp_path: Path, text: Path) -> None:
    config = _config(tmp_path, text, ParallelConfig(), async_save=True)
    config.numerics.on_bad_batch = OnBadBatch.stop
    for sentence in ranks.run(_diverge, config, world_size=2, parallel=ParallelConfig()):
        assert "at iteration 3" in sentence
    assert latest_iteration(tmp_path / "checkpoints") == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []


def _full_disk_later(groups: ProcessGroups, config: RunConfig) -> str:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    write_item = filesystem_async._write_item

    def full(*_: object, **__: object) -> None:
        time.sleep(0.05)
        raise OSError(28, "No space left on device")

    if groups.rank == 1:
        filesystem_async._write_item = full
    try:
        with pytest.raises(CheckpointError) as refused:
            train(groups, config)
    finally:
        filesystem_async._write_item = write_item
    return str(refused.value)


def test_a_disk_that_is_full_some_steps_later_ends_all_ranks_with_the_same_sentence(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    config = _config(tmp_path, text, ParallelConfig(), async_save=True)
    sentences = ranks.run(_full_disk_later, config, world_size=2, parallel=ParallelConfig())
    assert sentences[0] == sentences[1] and "cannot be written (rank 1: " in sentences[0]
    assert list((tmp_path / "checkpoints").iterdir()) == []
