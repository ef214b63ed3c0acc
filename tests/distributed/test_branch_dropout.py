"""Drop-out of softmax branches: which sequences it takes them from, and that runs repeat it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.model import ModelConfig, ParallelHybridConfig
from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.storage.checkpoint_folder import LATEST_ITERATION_FILE, iteration_folder
from tests.distributed.gradients import model_of_known_weights
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import MODEL, checkpoint_config, run_config, train

BRANCHES = replace(
    MODEL,
    num_layers=2,
    mixers=[["gla", "swa"]],
    parallel_hybrid=ParallelHybridConfig(0.8, 0.4, softmax_dropout=0.5),
)
ONE_RANK = ParallelConfig()
SEEDS = tuple(f"1234/{number}" for number in range(400))


def _outputs(groups: ProcessGroups, model: ModelConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one layer for equal rows: in training, in evaluation, of the linear branch alone; and draws."""
    mixers = [
        layer.self_attention for layer in model_of_known_weights(groups, model, ONE_RANK).decoder.layers
    ]
    first, second = (mixer.train() for mixer in mixers)
    hidden = torch.randn(5, 1, model.hidden_size, generator=torch.Generator().manual_seed(0))
    layout = SequenceLayout(5, sequence_seeds=SEEDS)
    with torch.no_grad():
        trained, _ = first(hidden.expand(-1, len(SEEDS), -1), packed_seq_params=layout)
        evaluated, _ = first.eval()(hidden, packed_seq_params=SequenceLayout(5))
        first.branch_weights[first.names.index("softmax")] = 0.0
        linear, _ = first(hidden, packed_seq_params=SequenceLayout(5))
    return trained, evaluated, linear, torch.cat([first._draw(layout), second._draw(layout)], dim=1)


def test_a_sequence_has_all_branches_as_in_evaluation_or_the_linear_one_alone(ranks: RankPool) -> None:
    ((trained, evaluated, linear, draws),) = ranks.run(_outputs, BRANCHES, world_size=1, parallel=ONE_RANK)
    assert not torch.allclose(evaluated, linear, atol=1e-2)
    kept = draws[:, 0].bool()
    expected = torch.where(kept[:, None], evaluated, linear)
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-5)
    # 400 draws of a half: five standard errors are 0.125. Layers draw independently.
    assert abs(draws.mean(0) - 0.5).max() < 0.125
    assert abs((draws[:, 0] == draws[:, 1]).float().mean() - 0.5) < 0.125


def test_softmax_branches_alone_are_never_dropped(ranks: RankPool) -> None:
    model = replace(BRANCHES, mixers=[["swa", "full"]])
    assert ranks.run(_dropout_of_layers, model, world_size=1, parallel=ONE_RANK) == [[0.0, 0.0]]
    assert ranks.run(_dropout_of_layers, BRANCHES, world_size=1, parallel=ONE_RANK) == [[0.5, 0.5]]


def _dropout_of_layers(groups: ProcessGroups, model: ModelConfig) -> list[float]:
    layers = model_of_known_weights(groups, model, ONE_RANK).decoder.layers
    return [layer.self_attention.dropout for layer in layers]


def test_a_run_repeats_its_draws_resumed_and_in_another_layout(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    stage = StageConfig(train_iters=4, seq_length=32, global_batch_size=4, micro_batch_size=1)
    one = run_config(
        tmp_path / "one",
        text,
        model=BRANCHES,
        stage=stage,
        checkpoint=checkpoint_config(save_interval=2),
    )
    (steps,) = ranks.run(train, one, world_size=1, parallel=ONE_RANK)

    checkpoints = tmp_path / "one" / "checkpoints"
    shutil.rmtree(iteration_folder(checkpoints, 4))
    (checkpoints / LATEST_ITERATION_FILE).write_text("2\n")
    assert ranks.run(train, one, world_size=1, parallel=ONE_RANK) == [steps[2:]]

    # Two data-parallel replicas of two sequences each, with every layer computed twice.
    parallel = ParallelConfig(recompute=Recompute.full)
    two = replace(
        one, parallel=parallel, stage=replace(stage, micro_batch_size=2), output_dir=str(tmp_path / "two")
    )
    of_two, _ = ranks.run(train, two, world_size=2, parallel=parallel)
    assert [loss for loss, _ in of_two] == pytest.approx([loss for loss, _ in steps], rel=1e-5)

    without = replace(
        one, model=replace(BRANCHES, parallel_hybrid=ParallelHybridConfig(0.8, 0.4)), output_dir=str(tmp_path)
    )
    (others,) = ranks.run(train, without, world_size=1, parallel=ONE_RANK)
    assert others[0] != steps[0]
