"""With numerics.deterministic resumed and repeated runs are as the first one, and replays compare bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.reporting.metrics import read_metrics
from spikingbrain_train.storage.checkpoint_folder import iteration_folder, set_latest_iteration
from spikingbrain_train.training.callbacks.callback import Callback
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import MODEL_76B, run_config


class SpoilsASample(Callback):
    """The sample 5 carries a NaN whenever it is read; torch and megatron-core have been told of the mode."""

    def start(self) -> None:
        assert torch.are_deterministic_algorithms_enabled()
        assert self.run.state.model.config.deterministic_mode
        data: Any = self.run.data
        read = data.train_batches

        def train_batches(consumed_samples: int) -> Iterator[Any]:
            for batch in read(consumed_samples):
                for row, seed in enumerate(batch.layout.sequence_seeds):
                    if seed.endswith("/5"):
                        batch.loss_mask[row, 0] = float("nan")
                yield batch

        data.train_batches = train_batches


def _run(config: RunConfig) -> bool:
    """What a command runs; whether torch is as it was behind it."""
    from spikingbrain_train.training import trainer

    trainer.run(config)
    return not torch.are_deterministic_algorithms_enabled()


def test_a_resumed_run_is_that_which_nobody_interrupted_to_the_last_bit(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    parallel = ParallelConfig(expert_model_parallel_size=2, use_distributed_optimizer=True)
    config = run_config(tmp_path, text, model=MODEL_76B, parallel=parallel)
    config.numerics.deterministic = True
    config.callbacks = [f"{__name__}.SpoilsASample"]
    config.stage.train_iters, config.stage.micro_batch_size, config.checkpoint.save_interval = 5, 2, 3
    assert ranks.run(_run, config, world_size=2, parallel=None) == [True, True]
    whole = [point["train/loss"] for point in read_metrics(tmp_path) if "train/loss" in point]
    checkpoints = tmp_path / "checkpoints"
    shutil.move(iteration_folder(checkpoints, 5), tmp_path / "whole")
    set_latest_iteration(checkpoints, 3)

    ranks.run(_run, config, world_size=2, parallel=None)

    assert [point["train/loss"] for point in read_metrics(tmp_path) if "train/loss" in point] == whole
    assert len(whole) == 4, "the second batch is left out"
    before, after = (
        MegatronCheckpointReader(folder) for folder in (tmp_path / "whole", iteration_folder(checkpoints, 5))
    )
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        assert torch.equal(before.read(name), after.read(name)), name

    other = run_config(tmp_path / "other", text, parallel=ParallelConfig(tensor_model_parallel_size=2))
    other.stage.train_iters = 2
    again = replace(config, output_dir=str(tmp_path / "again"))
    for each in (other, again):  # a job each: a second world needs a store of its own
        ranks.run(_run, each, world_size=2, parallel=None)
    repeated = MegatronCheckpointReader(iteration_folder(tmp_path / "again" / "checkpoints", 5))
    for name in before.tensors:
        assert torch.equal(before.read(name), repeated.read(name)), f"{name} depends on what ran before"

    [line] = [json.loads(line) for line in (tmp_path / "bad_batches.jsonl").read_text().splitlines()]
    assert line["computed_again"] == "it is the same to the last bit: the data or the weights"
