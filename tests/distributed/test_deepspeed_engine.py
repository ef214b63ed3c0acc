"""DeepSpeed's ZeRO trains as megatron-core does, and a run goes on with either."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import EngineKind, ParallelConfig, ZeroConfig
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.storage.checkpoint_folder import LATEST_ITERATION_FILE, iteration_folder
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import (
    MODEL,
    MODEL_76B,
    checkpoint_config,
    run_config,
    train,
    train_and_not_save,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the extra deepspeed is not installed"
)

# What another order of fp32 sums makes of a loss, as between megatron-core's own topologies.
TOLERANCE = 1e-5
STEPS = 10
"""Of a run: the learning rate is at its peak from the second on, and rounding has time to add up."""
ON_TWO_RANKS = {
    "ZeRO 1, DP 2": ParallelConfig(zero=ZeroConfig(1)),
    "ZeRO 2, DP 2": ParallelConfig(zero=ZeroConfig(2)),
    "ZeRO 2, DP 2, offloaded": ParallelConfig(zero=ZeroConfig(2, offload_optimizer=True)),
    "ZeRO 1, CP 2": ParallelConfig(zero=ZeroConfig(1), context_parallel_size=2),
    "ZeRO 2, CP 2": ParallelConfig(zero=ZeroConfig(2), context_parallel_size=2),
    "ZeRO 3, DP 2": ParallelConfig(zero=ZeroConfig(3)),
    "ZeRO 3, CP 2, offloaded": ParallelConfig(
        zero=ZeroConfig(3, offload_optimizer=True), context_parallel_size=2
    ),
}


def _deepspeed(parallel: ParallelConfig) -> ParallelConfig:
    return replace(parallel, engine=EngineKind.deepspeed)


@pytest.fixture(scope="module")
def of_one_rank(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path, hybrid_checkpoint: Path
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of ten steps of megatron-core on one rank."""
    folder = tmp_path_factory.mktemp("one_rank")
    config = run_config(folder, text, checkpoint=checkpoint_config(hybrid_checkpoint))
    (steps,) = ranks.run(train_and_not_save, config, world_size=1, parallel=config.parallel)
    return steps


@pytest.mark.parametrize("layout", ON_TWO_RANKS)
def test_ten_steps_have_the_losses_of_one_rank_of_the_megatron_engine(
    layout: str,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
    of_one_rank: list[tuple[float, float]],
) -> None:
    parallel = _deepspeed(ON_TWO_RANKS[layout])
    config = run_config(tmp_path, text, parallel=parallel, checkpoint=checkpoint_config(hybrid_checkpoint))
    first, second = ranks.run(train_and_not_save, config, STEPS, world_size=2, parallel=parallel)
    assert first == second and len(first) == STEPS
    for (loss, norm), (expected_loss, expected_norm) in zip(first, of_one_rank, strict=True):
        assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
        assert norm == pytest.approx(expected_norm, rel=1e-3)


def _interrupt_after(config: RunConfig, iteration: int) -> None:
    checkpoints = Path(config.output_dir) / "checkpoints"
    for folder in checkpoints.glob("iter_*"):
        if folder != iteration_folder(checkpoints, iteration):
            shutil.rmtree(folder)
    (checkpoints / LATEST_ITERATION_FILE).write_text(f"{iteration}\n")


@pytest.mark.parametrize(
    ("model", "parallel", "precision"),
    [
        (MODEL, ParallelConfig(zero=ZeroConfig(1)), Precision.bf16),
        (MODEL, ParallelConfig(zero=ZeroConfig(2)), Precision.bf16),
        (MODEL_76B, ParallelConfig(zero=ZeroConfig(2), use_distributed_optimizer=True), Precision.fp32),
        (
            MODEL,
            ParallelConfig(zero=ZeroConfig(2, offload_optimizer=True), context_parallel_size=2),
            Precision.fp32,
        ),
        (MODEL, ParallelConfig(zero=ZeroConfig(3)), Precision.bf16),
        (
            MODEL_76B,
            ParallelConfig(zero=ZeroConfig(3), use_distributed_optimizer=True, context_parallel_size=2),
            Precision.fp32,
        ),
    ],
    ids=[
        "ZeRO 1, bf16",
        "ZeRO 2, bf16",
        "ZeRO 2, experts, the other form of checkpoints",
        "ZeRO 2, CP 2, offloaded",
        "ZeRO 3, bf16",
        "ZeRO 3, CP 2, experts, the other form of checkpoints",
    ],
)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
) -> None:
    parallel = _deepspeed(parallel)
    checkpoint = checkpoint_config(
        hybrid_checkpoint if model is MODEL else None,
        save_interval=2,
        async_save=precision is Precision.fp32,
    )
    config = run_config(
        tmp_path, text, model=model, parallel=parallel, precision=precision, checkpoint=checkpoint
    )
    config.stage = replace(config.stage, train_iters=4)
    # What is still being written when a run ends is waited for where its end is saved.
    run = train if config.checkpoint.async_save else train_and_not_save
    uninterrupted = ranks.run(run, config, world_size=2, parallel=parallel)
    _interrupt_after(config, 2)
    resumed = ranks.run(train_and_not_save, config, world_size=2, parallel=parallel)
    assert resumed == [steps[2:] for steps in uninterrupted]


@pytest.mark.parametrize("is_distributed_form", [False, True], ids=["plain form", "distributed form"])
def test_a_run_changes_its_engine_and_ranks_and_goes_on_with_its_moments(
    is_distributed_form: bool,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
    of_one_rank: list[tuple[float, float]],
) -> None:
    """Moments that began anew would show: the loss of step 4 would be off by some percent."""
    megatron = ParallelConfig(use_distributed_optimizer=is_distributed_form)
    config = run_config(tmp_path, text, parallel=megatron, checkpoint=checkpoint_config(hybrid_checkpoint))
    steps = []
    for parallel, world_size, until in (
        (megatron, 1, 3),
        (_deepspeed(replace(megatron, zero=ZeroConfig(3))), 2, 3),
        (_deepspeed(replace(megatron, zero=ZeroConfig(1), context_parallel_size=2)), 2, 2),
        (megatron, 2, 2),
    ):
        config.parallel = parallel
        found = ranks.run(train, config, until, world_size=world_size, parallel=parallel)
        steps += found[0]
    losses, expected = [loss for loss, _ in steps], [loss for loss, _ in of_one_rank]
    assert losses == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("is_distributed_form", [False, True], ids=["plain form", "distributed form"])
def test_experts_train_as_on_one_rank_and_go_on_with_either_engine(
    is_distributed_form: bool, ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    """Spread over expert-parallel ranks in between; experts that no token was sent to have gradients, too.

    Some keep their activations and others compute them again, each rank as many as its tokens ask for.
    """
    plain = ParallelConfig(use_distributed_optimizer=is_distributed_form)
    config = run_config(tmp_path / "one", text, model=MODEL_76B, parallel=plain)
    (expected,) = ranks.run(train_and_not_save, config, 7, world_size=1, parallel=plain)
    config = run_config(tmp_path / "two", text, model=MODEL_76B)
    steps = []
    for parallel, until in (
        (_deepspeed(replace(plain, zero=ZeroConfig(1), recompute_expert_tokens=4)), 3),
        (replace(plain, expert_model_parallel_size=2), 2),
        (_deepspeed(replace(plain, context_parallel_size=2)), 2),
    ):
        config.parallel = parallel
        steps += ranks.run(train, config, until, world_size=2, parallel=parallel)[0]
    assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in expected], rel=TOLERANCE)
    assert [norm for _, norm in steps] == pytest.approx([norm for _, norm in expected], rel=1e-3)


def _of_stage(name: str, folder: Path, text: Path, teacher: Path, student: Path) -> RunConfig:
    stage = StageConfig(
        kind=name, train_iters=4, seq_length=32, global_batch_size=4, micro_batch_size=1, teacher=str(teacher)
    )
    return run_config(folder, text, stage=stage, checkpoint=checkpoint_config(student))


@pytest.fixture(scope="module")
def taught_on_one_rank(
    ranks: RankPool,
    tmp_path_factory: pytest.TempPathFactory,
    text: Path,
    dense_checkpoint: Path,
    hybrid_checkpoint: Path,
) -> dict[str, list[tuple[float, float]]]:
    """(loss, gradient norm) of the steps of each stage that learns from a teacher."""
    found = {}
    for stage in ("align", "distill"):
        folder = tmp_path_factory.mktemp(stage)
        config = _of_stage(stage, folder, text, dense_checkpoint, hybrid_checkpoint)
        (found[stage],) = ranks.run(train_and_not_save, config, world_size=1, parallel=config.parallel)
    return found


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("stage", ["align", "distill"])
def test_stages_that_learn_from_a_teacher_have_the_losses_of_one_rank(
    stage: str,
    zero: int,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    dense_checkpoint: Path,
    hybrid_checkpoint: Path,
    taught_on_one_rank: dict[str, list[tuple[float, float]]],
) -> None:
    config = _of_stage(stage, tmp_path, text, dense_checkpoint, hybrid_checkpoint)
    config.parallel = _deepspeed(ParallelConfig(zero=ZeroConfig(zero), context_parallel_size=2))
    found, _ = ranks.run(train_and_not_save, config, world_size=2, parallel=config.parallel)
    # The divergence of two models of random weights, 1e-5, is the difference of numbers near 5: what fp32
    # leaves of those is an absolute error (test_distillation.py allows 1e-7 between topologies).
    assert [loss for loss, _ in found] == pytest.approx(
        [loss for loss, _ in taught_on_one_rank[stage]],
        rel=TOLERANCE,
        abs=5e-8 if stage == "distill" else 0.0,
    )


def test_steps_in_bf16_have_the_losses_of_the_megatron_engine(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    """In fp32 sums of four bf16 gradients are exact, in any order, unless these differ by 2^14 or more.

    So both stages add up the same gradients as one rank does, and the bound is that of fp32 runs. What is
    left is AdamW's rounding, which the next bf16 weight hides but for one that lies between two.
    """
    found = []
    for name, world_size, parallel in (
        ("megatron", 1, ParallelConfig()),
        ("ZeRO 1", 2, _deepspeed(ParallelConfig(zero=ZeroConfig(1)))),
        ("ZeRO 2", 2, _deepspeed(ParallelConfig(zero=ZeroConfig(2)))),
        ("ZeRO 3", 2, _deepspeed(ParallelConfig(zero=ZeroConfig(3)))),
    ):
        config = run_config(tmp_path / name, text, parallel=parallel, precision=Precision.bf16)
        run = ranks.run(train_and_not_save, config, STEPS, world_size=world_size, parallel=parallel)
        found.append(run[0])
    expected, *of_stages = found
    for steps in of_stages:
        assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in expected], rel=TOLERANCE)
        assert [norm for _, norm in steps] == pytest.approx([norm for _, norm in expected], rel=1e-3)
