"""Models with experts train to the same numbers wherever their experts are, and resume anywhere.

Tolerances as in test_training_topologies. The balancing losses belong to what is compared: they act on the
gradients (whose norm is compared) and so on every later loss, with weights a hundred times the default here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.config.model import MoEConfig
from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.reporting.metrics import read_metrics
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import MODEL_76B, checkpoint_config, run_config, train, train_and_not_save
from tests.distributed.test_resume import _interrupt_after

TOLERANCE = 1e-5
STEPS = 4
"""Of the ten of a run, wherever one rank has taken all of them."""
MODEL = replace(
    MODEL_76B,
    moe=MoEConfig(num_experts=4, router_topk=2, aux_loss_coeff=1.0, z_loss_coeff=0.1),
)
EXPERT_PARALLEL = ParallelConfig(expert_model_parallel_size=2)
TOPOLOGIES: dict[str, tuple[int, ParallelConfig]] = {
    "EP 2": (2, EXPERT_PARALLEL),
    "EP 4, overlapped distributed optimizer": (
        4,
        ParallelConfig(
            expert_model_parallel_size=4,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
    ),
    "EP 2 x DP 2, distributed optimizer": (
        4,
        replace(EXPERT_PARALLEL, use_distributed_optimizer=True),
    ),
    "PP 2 x EP 2": (4, replace(EXPERT_PARALLEL, pipeline_model_parallel_size=2)),
    "PP 2 of 2 virtual stages x EP 2, full recomputation": (
        4,
        replace(
            EXPERT_PARALLEL,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
            recompute=Recompute.full,
        ),
    ),
    "EP 2 over CP 2": (2, replace(EXPERT_PARALLEL, context_parallel_size=2)),
    "TP 2 + sequence parallel, EP 2 of whole experts": (
        2,
        replace(
            EXPERT_PARALLEL,
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            expert_tensor_parallel_size=1,
        ),
    ),
    "TP 2 + sequence parallel x EP 2": (
        4,
        replace(EXPERT_PARALLEL, tensor_model_parallel_size=2, sequence_parallel=True),
    ),
    "one rank, full recomputation": (1, ParallelConfig(recompute=Recompute.full)),
    "EP 2, recomputed activations": (2, replace(EXPERT_PARALLEL, recompute=Recompute.moe_activation)),
    "EP 2, overlapped, busy experts recomputed": (
        2,
        replace(
            EXPERT_PARALLEL,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            recompute_expert_tokens=16,
        ),
    ),
    "EP 2, busy experts replicated": (
        2,
        replace(
            EXPERT_PARALLEL,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            replicate_expert_load=1.2,
        ),
    ),
    "EP 2, recomputed experts": (2, replace(EXPERT_PARALLEL, recompute=Recompute.moe_feed_forward)),
}

Run = tuple[list[tuple[float, float]], list[dict[str, Any]]]


def _config(
    folder: Path, text: Path, checkpoint: Path, parallel: ParallelConfig, **changes: Any
) -> RunConfig:
    return run_config(
        folder,
        text,
        model=MODEL,
        parallel=parallel,
        checkpoint=checkpoint_config(checkpoint, **changes),
    )


@pytest.fixture(scope="module")
def one_rank(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path, hybrid_76b_checkpoint: Path
) -> Run:
    folder = tmp_path_factory.mktemp("one_rank")
    config = _config(folder, text, hybrid_76b_checkpoint, ParallelConfig())
    (steps,) = ranks.run(train_and_not_save, config, world_size=1, parallel=ParallelConfig())
    return steps, _router_points(folder)


def _router_points(folder: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in point.items() if name.startswith("moe/")}
        for point in read_metrics(folder)
    ]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_losses_gradient_norms_and_router_metrics_equal_those_of_one_rank(
    name: str, ranks: RankPool, tmp_path: Path, text: Path, hybrid_76b_checkpoint: Path, one_rank: Run
) -> None:
    world_size, parallel = TOPOLOGIES[name]
    config = _config(tmp_path, text, hybrid_76b_checkpoint, parallel)
    config.stage.micro_batch_size = 2 if world_size == 2 else 1  # fewer of gloo's slow collectives
    expected_steps, expected_points = one_rank

    for steps in ranks.run(train_and_not_save, config, STEPS, world_size=world_size, parallel=parallel):
        assert [loss for loss, _ in steps] == pytest.approx(
            [loss for loss, _ in expected_steps[:STEPS]], rel=TOLERANCE
        )
        assert [norm for _, norm in steps] == pytest.approx(
            [norm for _, norm in expected_steps[:STEPS]], rel=10 * TOLERANCE
        )
    points = _router_points(tmp_path)
    assert len(points) == STEPS and len(expected_points) == 10
    for point, expected in zip(points, expected_points[:STEPS], strict=True):
        assert point.pop("moe/expert_load") == expected["moe/expert_load"]
        of_copies = point.keys() - expected.keys()
        assert bool(of_copies) == (parallel.replicate_expert_load is not None)
        routed = {name: value for name, value in point.items() if name not in of_copies}
        assert routed == pytest.approx({name: expected[name] for name in routed}, rel=TOLERANCE)


def test_router_metrics_are_of_every_layer_and_expert(one_rank: Run) -> None:
    _, points = one_rank
    for point in points:
        loads = point["moe/expert_load"]
        assert len(loads) == 2 and all(sum(row) == pytest.approx(4.0, abs=1e-3) for row in loads)
        assert point["moe/load_max_over_mean/layer_1"] == pytest.approx(max(loads[0]), abs=1e-3)
        assert point["moe/load_max_over_mean/layer_3"] == pytest.approx(max(loads[1]), abs=1e-3)
        assert point["moe/dropped_tokens"] == 0.0
        assert 0.9 < point["moe/aux_loss"] < 4.0


def test_the_balancing_loss_balances(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_76b_checkpoint: Path, one_rank: Run
) -> None:
    config = _config(tmp_path, text, hybrid_76b_checkpoint, ParallelConfig())
    config.model = replace(MODEL, moe=replace(MODEL.moe, aux_loss_coeff=0.0, z_loss_coeff=0.0))
    ranks.run(train_and_not_save, config, world_size=1, parallel=ParallelConfig())

    assert one_rank[1][-1]["moe/aux_loss"] < _router_points(tmp_path)[-1]["moe/aux_loss"]


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16], ids=lambda p: p.value)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    precision: Precision, ranks: RankPool, tmp_path: Path, text: Path, hybrid_76b_checkpoint: Path
) -> None:
    parallel = replace(EXPERT_PARALLEL, use_distributed_optimizer=True)
    config = _config(tmp_path, text, hybrid_76b_checkpoint, parallel, save_interval=3)
    config.precision = precision
    config.stage.train_iters = 5
    uninterrupted = ranks.run(train_and_not_save, config, world_size=2, parallel=parallel)
    points = _router_points(tmp_path)
    _interrupt_after(tmp_path, 3)

    resumed = ranks.run(train_and_not_save, config, world_size=2, parallel=parallel)

    assert resumed == [steps[3:] for steps in uninterrupted]
    assert _router_points(tmp_path) == points


ELSEWHERE: dict[str, tuple[int, Callable[[ParallelConfig], ParallelConfig]]] = {
    "one rank": (1, lambda saved: replace(saved, expert_model_parallel_size=1)),
    "EP 4": (4, lambda saved: replace(saved, expert_model_parallel_size=4)),
    "PP 2 x EP 2": (4, lambda saved: replace(saved, pipeline_model_parallel_size=2)),
}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "distributed optimizer"])
def saved_at_ep2(
    request: pytest.FixtureRequest,
    ranks: RankPool,
    tmp_path_factory: pytest.TempPathFactory,
    text: Path,
    hybrid_76b_checkpoint: Path,
) -> tuple[Path, ParallelConfig]:
    """A run on two ranks, interrupted after three of ten steps."""
    parallel = replace(EXPERT_PARALLEL, use_distributed_optimizer=request.param)
    folder = tmp_path_factory.mktemp("saved_at_ep2")
    config = _config(folder, text, hybrid_76b_checkpoint, parallel, save_interval=3)
    ranks.run(train, config, 3, world_size=2, parallel=parallel)
    _interrupt_after(folder, 3)
    return folder, parallel


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_run_saved_at_ep2_resumes_elsewhere(
    name: str,
    saved_at_ep2: tuple[Path, ParallelConfig],
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_76b_checkpoint: Path,
    one_rank: Run,
) -> None:
    folder, saved = saved_at_ep2
    world_size, change = ELSEWHERE[name]
    parallel = change(saved)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)

    config = _config(tmp_path, text, hybrid_76b_checkpoint, parallel)
    resumed, *_ = ranks.run(train_and_not_save, config, STEPS, world_size=world_size, parallel=parallel)

    # Weights, moments and schedule came along: the losses are those of a run that never stopped.
    expected = [loss for loss, _ in one_rank[0][3 : 3 + STEPS]]
    assert [loss for loss, _ in resumed] == pytest.approx(expected, rel=TOLERANCE)
