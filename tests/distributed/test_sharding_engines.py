"""DeepSpeed's ZeRO and torch's FSDP2 train as megatron-core does, and a run goes on with any of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import EngineKind, FsdpConfig, ParallelConfig
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.config.stage import AlignmentConfig, AlignmentInputs, StageConfig
from spikingbrain_train.storage.checkpoint_folder import LATEST_ITERATION_FILE, iteration_folder
from tests.distributed.pool import RankPool
from tests.distributed.sharding_engines import case, fsdp, needs, zero
from tests.distributed.small_runs import (
    MODEL,
    MODEL_76B,
    checkpoint_config,
    run_config,
    train,
    train_and_not_save,
    values_of,
)

# What another order of fp32 sums makes of a loss, as between megatron-core's own topologies.
TOLERANCE = 1e-5
STEPS = 10
"""Of a run: the learning rate is at its peak from the second on, and rounding has time to add up."""
LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "ZeRO 1, DP 2": (2, zero(1)),
    "ZeRO 2, DP 2": (2, zero(2)),
    "ZeRO 2, DP 2, offloaded": (2, zero(2, offload_optimizer=True)),
    "ZeRO 1, CP 2": (2, zero(1, context_parallel_size=2)),
    "ZeRO 2, CP 2": (2, zero(2, context_parallel_size=2)),
    "ZeRO 3, DP 2": (2, zero(3)),
    "ZeRO 3, CP 2, offloaded": (2, zero(3, offload_optimizer=True, context_parallel_size=2)),
    "FSDP, DP 2": (2, fsdp()),
    "FSDP, DP 4": (4, fsdp()),  # 130 tokens leave its last rank with less than others
    "FSDP, CP 2, weights kept until the backward pass": (
        2,
        fsdp(context_parallel_size=2, fsdp=FsdpConfig(reshard_after_forward=False)),
    ),
    "FSDP, TP 2 + sequence parallel x DP 2": (
        4,
        fsdp(tensor_model_parallel_size=2, sequence_parallel=True),
    ),
    "FSDP, TP 2 x CP 2": (4, fsdp(tensor_model_parallel_size=2, context_parallel_size=2)),
}


@pytest.fixture(scope="module")
def of_one_rank(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path, hybrid_checkpoint: Path
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of ten steps of megatron-core on one rank."""
    folder = tmp_path_factory.mktemp("one_rank")
    config = run_config(folder, text, checkpoint=checkpoint_config(hybrid_checkpoint))
    (steps,) = ranks.run(train_and_not_save, config, world_size=1, parallel=config.parallel)
    return steps


@pytest.mark.parametrize("layout", [case(name, engine=each.engine) for name, (_, each) in LAYOUTS.items()])
def test_ten_steps_have_the_losses_of_one_rank_of_the_megatron_engine(
    layout: str,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
    of_one_rank: list[tuple[float, float]],
) -> None:
    world_size, parallel = LAYOUTS[layout]
    config = run_config(tmp_path, text, parallel=parallel, checkpoint=checkpoint_config(hybrid_checkpoint))
    first, *others = ranks.run(train_and_not_save, config, STEPS, world_size=world_size, parallel=parallel)
    assert others == [first] * (world_size - 1) and len(first) == STEPS
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
    ("model", "world_size", "parallel", "precision"),
    [
        case(model, world_size, parallel, precision, engine=parallel.engine, name=name)
        for name, model, world_size, parallel, precision in (
            ("ZeRO 1, bf16", MODEL, 2, zero(1), Precision.bf16),
            ("ZeRO 2, bf16", MODEL, 2, zero(2), Precision.bf16),
            (
                *("ZeRO 2, experts, the other form of checkpoints", MODEL_76B, 2),
                *(zero(2, use_distributed_optimizer=True), Precision.fp32),
            ),
            (
                *("ZeRO 2, CP 2, offloaded", MODEL, 2),
                *(zero(2, offload_optimizer=True, context_parallel_size=2), Precision.fp32),
            ),
            ("ZeRO 3, bf16", MODEL, 2, zero(3), Precision.bf16),
            (
                *("ZeRO 3, CP 2, experts, the other form of checkpoints", MODEL_76B, 2),
                *(zero(3, use_distributed_optimizer=True, context_parallel_size=2), Precision.fp32),
            ),
            ("FSDP, bf16", MODEL, 2, fsdp(), Precision.bf16),
            # Weights of two branches, of which half of the ranks have none.
            ("FSDP, DP 4, branches", MODEL_76B, 4, fsdp(), Precision.fp32),
            (
                *("FSDP, TP 2 x DP 2, experts, the other form of checkpoints", MODEL_76B, 4),
                fsdp(tensor_model_parallel_size=2, sequence_parallel=True, use_distributed_optimizer=True),
                Precision.bf16,
            ),
        )
    ],
)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    model: ModelConfig,
    world_size: int,
    parallel: ParallelConfig,
    precision: Precision,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
) -> None:
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
    uninterrupted = ranks.run(run, config, world_size=world_size, parallel=parallel)
    _interrupt_after(config, 2)
    resumed = ranks.run(train_and_not_save, config, world_size=world_size, parallel=parallel)
    assert resumed == [steps[2:] for steps in uninterrupted]


CHAINS: dict[str, list[tuple[ParallelConfig, int, int]]] = {
    "DeepSpeed": [
        (ParallelConfig(), 1, 3),
        (zero(3), 2, 3),
        (zero(1, context_parallel_size=2), 2, 2),
        (ParallelConfig(), 2, 2),
    ],
    "FSDP": [
        (ParallelConfig(), 1, 2),
        (fsdp(), 2, 2),
        (fsdp(tensor_model_parallel_size=2), 4, 2),
        (ParallelConfig(tensor_model_parallel_size=2), 2, 2),
        (fsdp(context_parallel_size=2), 4, 2),
    ],
    "both": [(fsdp(), 2, 3), (zero(2), 2, 3), (fsdp(tensor_model_parallel_size=2), 2, 2), (zero(3), 2, 2)],
}
"""Layout and ranks of a run, and for how many steps it has them, ten in all."""


@pytest.mark.parametrize(
    ("chain", "is_distributed_form"),
    [
        pytest.param(
            *(name, is_distributed_form),
            marks=needs(*{each.engine for each, _, _ in CHAINS[name]}),
            id=f"{name}, {'distributed' if is_distributed_form else 'plain'} form",
        )
        for name, is_distributed_form in (
            ("DeepSpeed", True),
            ("FSDP", False),
            ("FSDP", True),
            ("both", False),
        )
    ],
)
def test_a_run_changes_its_engine_and_ranks_and_goes_on_with_its_moments(
    chain: str,
    is_distributed_form: bool,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
    of_one_rank: list[tuple[float, float]],
) -> None:
    """Moments that began anew would show: the loss of step 4 would be off by some percent."""
    steps = []
    for layout, world_size, until in CHAINS[chain]:
        parallel = replace(layout, use_distributed_optimizer=is_distributed_form)
        checkpoint = checkpoint_config(hybrid_checkpoint)
        config = run_config(tmp_path, text, parallel=parallel, checkpoint=checkpoint)
        steps += ranks.run(train, config, until, world_size=world_size, parallel=parallel)[0]
    losses, expected = [loss for loss, _ in steps], [loss for loss, _ in of_one_rank]
    assert losses == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "last", "is_distributed_form"),
    [
        case(
            *(zero(1, recompute_expert_tokens=4), zero(2, context_parallel_size=2), False),
            engine=EngineKind.deepspeed,
            name="ZeRO 1, 2, plain form",
        ),
        case(
            *(fsdp(recompute_expert_tokens=4), fsdp(context_parallel_size=2), True),
            engine=EngineKind.fsdp,
            name="FSDP, distributed form",
        ),
    ],
)
def test_experts_train_as_on_one_rank_and_go_on_with_either_engine(
    first: ParallelConfig,
    last: ParallelConfig,
    is_distributed_form: bool,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
) -> None:
    """Spread over expert-parallel ranks in between; experts that no token was sent to have gradients, too.

    Some keep their activations and others compute them again, each rank as many as its tokens ask for.
    """
    plain = ParallelConfig(use_distributed_optimizer=is_distributed_form)
    config = run_config(tmp_path / "one", text, model=MODEL_76B, parallel=plain)
    (expected,) = ranks.run(train_and_not_save, config, 7, world_size=1, parallel=plain)
    config = run_config(tmp_path / "two", text, model=MODEL_76B)
    steps = []
    for layout, until in ((first, 3), (replace(plain, expert_model_parallel_size=2), 2), (last, 2)):
        parallel = replace(layout, use_distributed_optimizer=is_distributed_form)
        config.parallel = parallel
        steps += ranks.run(train, config, until, world_size=2, parallel=parallel)[0]
    assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in expected], rel=TOLERANCE)
    assert [norm for _, norm in steps] == pytest.approx([norm for _, norm in expected], rel=1e-3)


STAGES: dict[str, dict[str, Any]] = {
    "align": {"kind": "align"},
    "align on what the student has made": {
        "kind": "align",
        "alignment": AlignmentConfig(inputs=AlignmentInputs.student),
    },
    "distill": {"kind": "distill"},
}
"""Settings of each stage that learns from a teacher."""


def _of_stage(name: str, folder: Path, text: Path, teacher: Path, student: Path) -> RunConfig:
    sizes: dict[str, Any] = {"seq_length": 32, "global_batch_size": 4, "micro_batch_size": 1}
    stage = StageConfig(train_iters=4, teacher=str(teacher), **sizes, **STAGES[name])
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
    for stage in STAGES:
        folder = tmp_path_factory.mktemp("stage")
        config = _of_stage(stage, folder, text, dense_checkpoint, hybrid_checkpoint)
        (found[stage],) = ranks.run(train_and_not_save, config, world_size=1, parallel=config.parallel)
    return found


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        case(world_size, parallel, engine=parallel.engine, name=name)
        for name, world_size, parallel in (
            ("ZeRO 2, CP 2", 2, zero(2, context_parallel_size=2)),
            ("ZeRO 3, CP 2", 2, zero(3, context_parallel_size=2)),
            ("FSDP, CP 2", 2, fsdp(context_parallel_size=2)),
            (
                *("FSDP, TP 2 + sequence parallel x DP 2", 4),
                fsdp(tensor_model_parallel_size=2, sequence_parallel=True),
            ),
        )
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_stages_that_learn_from_a_teacher_have_the_losses_of_one_rank(
    stage: str,
    world_size: int,
    parallel: ParallelConfig,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    dense_checkpoint: Path,
    hybrid_checkpoint: Path,
    taught_on_one_rank: dict[str, list[tuple[float, float]]],
) -> None:
    config = _of_stage(stage, tmp_path, text, dense_checkpoint, hybrid_checkpoint)
    config.parallel = parallel
    found, *_ = ranks.run(train_and_not_save, config, world_size=world_size, parallel=parallel)
    # The divergence of two models of random weights, 1e-5, is the difference of numbers near 5: what fp32
    # leaves of those is an absolute error (test_distillation.py allows 1e-7 between topologies).
    assert [loss for loss, _ in found] == pytest.approx(
        [loss for loss, _ in taught_on_one_rank[stage]],
        rel=TOLERANCE,
        abs=5e-8 if stage == "distill" else 0.0,
    )


@pytest.fixture(scope="module")
def in_bf16(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of ten steps of megatron-core on one rank."""
    config = run_config(tmp_path_factory.mktemp("bf16"), text, precision=Precision.bf16)
    return ranks.run(train_and_not_save, config, STEPS, world_size=1, parallel=config.parallel)[0]


@pytest.mark.parametrize(
    "parallel",
    [
        case(parallel, engine=parallel.engine, name=name)
        for name, parallel in {
            "ZeRO 1": zero(1),
            "ZeRO 2": zero(2),
            "ZeRO 3": zero(3),
            "FSDP": fsdp(),
        }.items()
    ],
)
def test_steps_in_bf16_have_the_losses_of_the_megatron_engine(
    parallel: ParallelConfig,
    in_bf16: list[tuple[float, float]],
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
) -> None:
    """In fp32 sums of four bf16 gradients are exact, in any order, unless these differ by 2^14 or more.

    So engines add up the same gradients as one rank does, and the bound is that of fp32 runs. What is
    left is AdamW's rounding, which the next bf16 weight hides but for one that lies between two.
    """
    config = run_config(tmp_path, text, parallel=parallel, precision=Precision.bf16)
    steps, _ = ranks.run(train_and_not_save, config, STEPS, world_size=2, parallel=parallel)
    assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in in_bf16], rel=TOLERANCE)
    assert [norm for _, norm in steps] == pytest.approx([norm for _, norm in in_bf16], rel=1e-3)


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        case(2, fsdp(context_parallel_size=2), engine=EngineKind.fsdp, name="FSDP, CP 2"),
        case(
            *(4, fsdp(tensor_model_parallel_size=2, sequence_parallel=True)),
            engine=EngineKind.fsdp,
            name="FSDP, TP 2 + sequence parallel x DP 2",
        ),
    ],
)
def test_steps_in_bf16_have_the_losses_of_the_megatron_engine_in_the_same_layout(
    world_size: int, parallel: ParallelConfig, ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    """Ranks that share a sequence or a layer round partial sums to bf16, which one rank does not."""
    found = []
    for layout in (replace(parallel, engine=EngineKind.megatron), parallel):
        folder = tmp_path / layout.engine.name
        config = run_config(folder, text, parallel=layout, precision=Precision.bf16)
        run = ranks.run(train_and_not_save, config, STEPS, world_size=world_size, parallel=layout)
        found.append(run[0])
    expected, steps = found
    norms = [values_of("train/parameter_norm", tmp_path / name) for name in ("megatron", "fsdp")]
    assert len(norms[0]) == STEPS and norms[1] == pytest.approx(norms[0], rel=TOLERANCE)
    assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in expected], rel=TOLERANCE)
    assert [norm for _, norm in steps] == pytest.approx([norm for _, norm in expected], rel=1e-3)
