"""Training gives the same numbers on every topology.

Tolerance 1e-5 relative over ten fp32 steps, for losses and gradient norms: splitting a sum over ranks changes
its rounding (about 1e-7 a step), and ten steps of AdamW at a high learning rate amplify that by less than a
hundred.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.config.run import DistillationConfig, RunConfig, StageConfig, StageKind
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import TOPOLOGIES, checkpoint_config, run_config, train

TOLERANCE = 1e-5

# The whole matrix for plain training; the two stages that add communication of their own on what they touch.
CASES = [("cpt", name) for name in TOPOLOGIES]
CASES += [
    (kind, name)
    for kind in ("align", "distill")
    for name in ("TP 2 + sequence parallel", "TP 2 x PP 2", "DP 2, distributed optimizer")
]


def _config(
    kind: str, output_dir: Path, text: Path, hybrid: Path, dense: Path, parallel: ParallelConfig | None = None
) -> RunConfig:
    config = run_config(
        output_dir, text, parallel=parallel or ParallelConfig(), checkpoint=checkpoint_config(hybrid)
    )
    if kind == "align":
        config.stage.kind, config.stage.teacher = StageKind.align, str(dense)
        config.optimizer.lr = 5e-4  # calibration leaves it close to a minimum
    elif kind == "distill":
        config.stage.teacher = str(dense)
        config.stage.distillation = DistillationConfig(weight=0.6, temperature=2.0)
    return config


@pytest.fixture(scope="module")
def one_rank(
    ranks: RankPool,
    tmp_path_factory: pytest.TempPathFactory,
    text: Path,
    hybrid_checkpoint: Path,
    dense_checkpoint: Path,
) -> dict[str, list[tuple[float, float]]]:
    """Losses and gradient norms of every kind of stage on one rank."""
    results = {}
    for kind in ("cpt", "align", "distill"):
        config = _config(kind, tmp_path_factory.mktemp(kind), text, hybrid_checkpoint, dense_checkpoint)
        (results[kind],) = ranks.run(train, config, world_size=1, parallel=ParallelConfig())
    return results


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind}: {name}" for kind, name in CASES])
def test_losses_and_gradient_norms_equal_those_of_one_rank(
    kind: str,
    name: str,
    one_rank: dict[str, list[tuple[float, float]]],
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
    dense_checkpoint: Path,
) -> None:
    world_size, parallel = TOPOLOGIES[name]
    config = _config(kind, tmp_path, text, hybrid_checkpoint, dense_checkpoint, parallel)

    results = ranks.run(train, config, world_size=world_size, parallel=parallel)

    for steps in results:
        assert len(steps) == 10
        for (loss, norm), (expected_loss, expected_norm) in zip(steps, one_rank[kind], strict=True):
            assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
            assert norm == pytest.approx(
                expected_norm, rel=10 * TOLERANCE
            )  # a square root of sums of squares of gradients


def test_every_kind_of_stage_learns(one_rank: dict[str, list[tuple[float, float]]]) -> None:
    for kind, steps in one_rank.items():
        assert steps[-1][0] < 0.95 * steps[0][0], f"{kind} went from {steps[0][0]} to {steps[-1][0]}"


def test_micro_batches_and_recomputation_do_not_change_the_numbers(
    one_rank: dict[str, list[tuple[float, float]]],
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
) -> None:
    stage = StageConfig(train_iters=10, seq_length=32, global_batch_size=4, micro_batch_size=4)
    parallel = ParallelConfig(recompute=Recompute.full)
    config: RunConfig = run_config(
        tmp_path, text, parallel=parallel, stage=stage, checkpoint=checkpoint_config(hybrid_checkpoint)
    )

    (steps,) = ranks.run(train, config, world_size=1, parallel=parallel)

    assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in one_rank["cpt"]], rel=TOLERANCE)
