"""Runs whose linears multiply in FP8: over ranks, resumed, computed again, and beside plain ones.

Data- and pipeline-parallel ranks round the tensors of a micro-batch as one rank does. A number that lies
between two of FP8 jumps by a sixteenth where a sum before it was rounded otherwise; so these runs leave no
sum to the order of ranks: two micro-batches a step, and no clipping by the norm.

Tensor- and context-parallel ranks round parts, with ``tensorwise`` each with a scale of its own: other codes,
that are as far from the numbers as those of one rank. (Scales that are powers of 2 give the same codes:
test_gradients.py holds these recipes to one rank at 1e-5 in every topology.)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import torch

from spikingbrain_train.config.fp8 import Fp8Config, Fp8Format, Fp8Recipe
from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.config.stage import DistillationConfig
from spikingbrain_train.reporting.metrics import read_metrics
from spikingbrain_train.storage.checkpoint_folder import LATEST_ITERATION_FILE, iteration_folder
from tests.distributed.gradients import CASES, Case, assemble, loss_and_gradients
from tests.distributed.pool import RankPool
from tests.distributed.sharding_engines import case, fsdp, zero
from tests.distributed.small_runs import (
    MODEL_76B,
    TOPOLOGIES,
    checkpoint_config,
    run_config,
    train_and_not_save,
)

FP8 = Fp8Config(Fp8Format.hybrid)
Steps = list[tuple[float, float]]


def config_of(folder: Path, text: Path, start: Path, **changes: Any) -> RunConfig:
    config = run_config(folder, text, checkpoint=checkpoint_config(start), **changes)
    config.stage = replace(config.stage, global_batch_size=2)
    config.optimizer = replace(config.optimizer, lr=3e-3, clip_grad=0.0)
    return config


def run(ranks: RankPool, config: RunConfig, world_size: int = 1) -> Steps:
    return ranks.run(train_and_not_save, config, world_size=world_size, parallel=config.parallel)[0]


def largest_difference(found: Steps, expected: Steps) -> float:
    """Of losses and gradient norms, relative."""
    assert len(found) == len(expected) == 10
    return max(
        abs(a - b) / b
        for step, other in zip(found, expected, strict=True)
        for a, b in zip(step, other, strict=True)
    )


@pytest.fixture(scope="module")
def of_one_rank(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path, hybrid_checkpoint: Path
) -> dict[str, Steps]:
    """Ten steps of the run without FP8 and with it."""
    return {
        name: run(ranks, config_of(tmp_path_factory.mktemp("run"), text, hybrid_checkpoint, fp8=fp8))
        for name, fp8 in (("plain", Fp8Config()), ("fp8", FP8))
    }


LAYOUTS = {
    **{name: TOPOLOGIES[name] for name in ("DP 2, distributed optimizer", "PP 2, uneven")},
    "PP 2 of 2 virtual stages": TOPOLOGIES["PP 2 of 2 virtual stages"],
    "FSDP": (2, fsdp()),
    "ZeRO 2": (2, zero(2)),
}


@pytest.mark.parametrize("layout", [case(name, engine=each.engine) for name, (_, each) in LAYOUTS.items()])
def test_ranks_that_round_whole_tensors_give_the_numbers_of_one_rank(
    layout: str,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
    of_one_rank: dict[str, Steps],
) -> None:
    world_size, parallel = LAYOUTS[layout]
    config = config_of(tmp_path, text, hybrid_checkpoint, fp8=FP8, parallel=parallel)
    found = run(ranks, config, world_size)
    assert largest_difference(found, of_one_rank["fp8"]) < 1e-5
    assert largest_difference(found, of_one_rank["plain"]) > 1e-4


@pytest.mark.parametrize("layout", ["TP 2", "TP 2 + sequence parallel", "CP 2", "CP 2 x TP 2"])
def test_ranks_that_round_parts_are_as_close_to_plain_gradients_as_one_rank_is(
    layout: str, ranks: RankPool
) -> None:
    layouts = {"CP 2 x TP 2": ParallelConfig(context_parallel_size=2, tensor_model_parallel_size=2)} | {
        name: parallel for name, (_, parallel) in TOPOLOGIES.items()
    }
    case = replace(CASES["full attention"], fp8=FP8)

    def gradients(case: Case, parallel: ParallelConfig) -> dict[str, torch.Tensor]:
        size = parallel.model_parallel_size
        found = ranks.run(loss_and_gradients, case, parallel, world_size=size, parallel=parallel)
        return assemble([shards for _, shards in found])

    plain = gradients(replace(case, fp8=None), ParallelConfig())
    one, split = gradients(case, ParallelConfig()), gradients(case, layouts[layout])

    def distance(found: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        parts = [(found[name] - other[name]).norm() ** 2 for name in other]
        return (sum(parts) ** 0.5 / sum(each.norm() ** 2 for each in other.values()) ** 0.5).item()

    assert 0.05 < distance(one, plain) < 0.2  # eight products, each with errors of 3 to 6 %
    assert distance(split, plain) < 1.2 * distance(one, plain)
    assert distance(split, one) > 0


@pytest.mark.parametrize("recipe", Fp8Recipe)
def test_a_loss_in_fp8_stays_close_to_that_without(
    recipe: Fp8Recipe,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
    of_one_rank: dict[str, Steps],
) -> None:
    config = config_of(tmp_path, text, hybrid_checkpoint, fp8=replace(FP8, recipe=recipe))
    found = run(ranks, config)
    losses = [(step[0], plain[0]) for step, plain in zip(found, of_one_rank["plain"], strict=True)]
    assert found != of_one_rank["plain"]
    assert max(abs(loss - plain) / plain for loss, plain in losses) < 5e-3


def test_layers_that_are_computed_again_are_rounded_as_before(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path, of_one_rank: dict[str, Steps]
) -> None:
    parallel = ParallelConfig(recompute=Recompute.full)
    config = config_of(tmp_path, text, hybrid_checkpoint, fp8=FP8, parallel=parallel)
    assert run(ranks, config) == of_one_rank["fp8"]


def test_without_a_layer_in_fp8_the_run_is_that_in_bf16(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path, of_one_rank: dict[str, Steps]
) -> None:
    """Layers at both ends count from the first of the whole model, on any pipeline rank."""
    ends = replace(FP8, num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=3)
    world_size, parallel = TOPOLOGIES["PP 2, uneven"]
    config = config_of(tmp_path / "none", text, hybrid_checkpoint, fp8=ends, parallel=parallel)
    assert largest_difference(run(ranks, config, world_size), of_one_rank["plain"]) < 1e-5
    middle = replace(ends, num_layers_at_end_in_bf16=2)
    one = run(ranks, config_of(tmp_path / "one", text, hybrid_checkpoint, fp8=middle))
    config = config_of(tmp_path / "two", text, hybrid_checkpoint, fp8=middle, parallel=parallel)
    assert largest_difference(run(ranks, config, world_size), one) < 1e-5
    assert one not in (of_one_rank["plain"], of_one_rank["fp8"])


@pytest.mark.parametrize("recipe", [Fp8Recipe.tensorwise, Fp8Recipe.blockwise])
def test_a_resumed_run_in_fp8_repeats_the_uninterrupted_one_bit_for_bit(
    recipe: Fp8Recipe, ranks: RankPool, tmp_path: Path, text: Path, hybrid_76b_checkpoint: Path
) -> None:
    """With experts over ranks, in bf16."""
    parallel = ParallelConfig(expert_model_parallel_size=2, use_distributed_optimizer=True)
    config = run_config(
        tmp_path,
        text,
        model=MODEL_76B,
        parallel=parallel,
        precision=Precision.bf16,
        fp8=replace(FP8, recipe=recipe),
        checkpoint=checkpoint_config(hybrid_76b_checkpoint, save_interval=3),
    )
    config.stage = replace(config.stage, train_iters=5, micro_batch_size=2)
    uninterrupted = ranks.run(train_and_not_save, config, world_size=2, parallel=parallel)
    checkpoints = tmp_path / "checkpoints"
    for later in checkpoints.glob("iter_*"):
        if later != iteration_folder(checkpoints, 3):
            rmtree(later)
    (checkpoints / LATEST_ITERATION_FILE).write_text("3\n")
    resumed = ranks.run(train_and_not_save, config, world_size=2, parallel=parallel)
    assert resumed == [steps[3:] for steps in uninterrupted]
    assert [len(steps) for steps in resumed] == [2, 2]


@pytest.mark.parametrize("kind", ["align", "distill"])
def test_students_of_a_teacher_train_in_fp8(
    kind: str, ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path, dense_checkpoint: Path
) -> None:
    """The teacher does not: what the student learns from is the same."""
    found = {}
    for name, fp8 in (("plain", Fp8Config()), ("one", FP8), ("stages", FP8)):
        world_size, parallel = TOPOLOGIES["PP 2"] if name == "stages" else (1, ParallelConfig())
        config = config_of(tmp_path / name, text, hybrid_checkpoint, fp8=fp8, parallel=parallel)
        # With the text's own loss: a student so close to its teacher has one of rounding alone.
        distillation = DistillationConfig(weight=0.6, temperature=2.0)
        config.stage = replace(
            config.stage, kind=kind, teacher=str(dense_checkpoint), distillation=distillation
        )
        found[name] = run(ranks, config, world_size)
    assert largest_difference(found["stages"], found["one"]) < 1e-5
    assert found["one"] != found["plain"]
    assert abs(found["one"][0][0] / found["plain"][0][0] - 1) < 0.01


def test_evaluations_are_those_of_the_weights_without_fp8(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path
) -> None:
    """As the checkpoint will be measured, and its export computes: at the start bit for bit."""
    held_out = []
    for fp8 in (Fp8Config(), FP8):
        folder = tmp_path / str(fp8.format)
        config = config_of(folder, text, hybrid_checkpoint, fp8=fp8)
        config.data.valid = [str(text)]
        run(ranks, config)
        name = "valid/cross_entropy"
        held_out.append([point[name] for point in read_metrics(folder) if name in point])
    (first, last), (first_in_fp8, last_in_fp8) = held_out
    assert first == first_in_fp8 and last != last_in_fp8
