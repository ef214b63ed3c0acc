"""Training gives the same numbers on every topology.

Tolerance 1e-5 relative over three fp32 steps, for losses and gradient norms: splitting a sum over ranks
changes its rounding (about 1e-7 a step), and AdamW at a high learning rate amplifies that by less than a
hundred.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.stage import (
    AlignmentConfig,
    AlignmentInputs,
    DecayStart,
    DistillationConfig,
    StageConfig,
)
from spikingbrain_train.reporting.metrics import read_metrics
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import (
    MODEL,
    MODEL_76B,
    TOPOLOGIES,
    checkpoint_config,
    run_config,
    train_and_not_save,
)

TOLERANCE = 1e-5
STEPS = 3
"""Of the ten of a run: one rank takes all of them. The learning rate is at its peak from the second on, whose
update the third one's loss sees."""

# The whole matrix for plain training. Every stage and both models meet TP, PP and CP, though not every
# stage of every model each of them.
CASES = [("cpt", name) for name in TOPOLOGIES if name != "EP 2"]
CASES += [
    (kind, name)
    for kind in ("align", "distill")
    for name in ("TP 2 x PP 2", "DP 2, distributed optimizer", "TP 2 + sequence parallel x CP 2")
]
CASES += [
    (kind, name) for kind in ("packed", "76B") for name in ("TP 2 + sequence parallel x CP 2", "PP 2 x CP 2")
]
CASES += [(kind, "PP 2 x CP 2") for kind in ("76B align", "76B distill")]
CASES += [(kind, "PP 2, uneven") for kind in ("76B align", "distill")]
CASES += [(kind, "PP 4") for kind in ("76B align", "76B distill")]
VIRTUAL = "PP 2 of 2 virtual stages"
CASES += [(kind, VIRTUAL) for kind in ("align", "distill", "76B", "76B align on its own inputs")]
CASES += [
    ("align on its own inputs", name)
    for name in ("TP 2 + sequence parallel", "PP 2 x CP 2", "DP 2, distributed optimizer")
]
CASES += [("76B align on its own inputs", name) for name in ("TP 2 + sequence parallel x CP 2", "EP 2")]
KINDS = sorted({kind for kind, _ in CASES})


@pytest.fixture(scope="module")
def checkpoints(
    hybrid_checkpoint: Path, hybrid_76b_checkpoint: Path, dense_checkpoint: Path
) -> dict[str, Path]:
    """Where the runs start, and their teacher."""
    return {"7B": hybrid_checkpoint, "76B": hybrid_76b_checkpoint, "teacher": dense_checkpoint}


def _config(
    kind: str, output_dir: Path, text: Path, checkpoints: dict[str, Path], parallel: ParallelConfig
) -> RunConfig:
    size = "76B" if kind.startswith("76B") else "7B"
    config = run_config(
        output_dir,
        text,
        model=MODEL_76B if size == "76B" else MODEL,
        parallel=parallel,
        checkpoint=checkpoint_config(checkpoints[size]),
    )
    # Fewer collectives, each of which costs gloo a millisecond.
    config.stage.micro_batch_size = 2
    config.data.reset_at_documents = kind == "packed" or size == "76B"
    if "align" in kind:
        config.stage.kind, config.stage.teacher = "align", str(checkpoints["teacher"])
        config.optimizer.lr = 5e-4  # calibration leaves it close to a minimum
        config.stage.alignment.calibration_inputs = AlignmentInputs.teacher
    if kind.endswith("own inputs"):
        config.stage.alignment = AlignmentConfig(
            calibration_inputs=AlignmentInputs.student,
            fit_channel_scales=True,
            fit_source_projections=True,
            decay_start=DecayStart.attention_distance,
            inputs=AlignmentInputs.student,
        )
    config.stage.alignment.calibration_tokens = 4 * 4 * 32  # the global batches of four steps
    if kind.endswith("distill"):
        config.stage.kind, config.stage.teacher = "distill", str(checkpoints["teacher"])
        config.stage.distillation = DistillationConfig(weight=0.6, temperature=2.0)
    return config


@pytest.fixture(scope="module")
def one_rank(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path, checkpoints: dict[str, Path]
) -> dict[str, OneRank]:
    """Losses and gradient norms of every kind of run on one rank."""
    results = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("run")
        config = _config(kind, folder, text, checkpoints, ParallelConfig())
        (steps,) = ranks.run(train_and_not_save, config, world_size=1, parallel=ParallelConfig())
        results[kind] = OneRank(steps, _reported_losses(folder))
    return results


@dataclass(frozen=True)
class OneRank:
    """A run on one rank."""

    steps: list[tuple[float, float]]
    """Loss and gradient norm of each."""
    reported: list[dict[str, float]]
    """Losses in the metrics file."""


def _reported_losses(folder: Path) -> list[dict[str, float]]:
    losses = ("train/loss", "train/cross_entropy", "train/kl_divergence")
    return [
        {name: value for name, value in point.items() if name in losses or name.startswith("align/")}
        for point in read_metrics(folder)
    ]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind}: {name}" for kind, name in CASES])
def test_losses_and_gradient_norms_equal_those_of_one_rank(
    kind: str,
    name: str,
    one_rank: dict[str, OneRank],
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    checkpoints: dict[str, Path],
) -> None:
    world_size, parallel = TOPOLOGIES[name]
    config = _config(kind, tmp_path, text, checkpoints, parallel)

    results = ranks.run(train_and_not_save, config, STEPS, world_size=world_size, parallel=parallel)

    for steps in results:
        assert len(steps) == STEPS
        expected_steps = one_rank[kind].steps[:STEPS]
        for (loss, norm), (expected_loss, expected_norm) in zip(steps, expected_steps, strict=True):
            assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
            assert norm == pytest.approx(
                expected_norm, rel=10 * TOLERANCE
            )  # a square root of sums of squares of gradients
    reported = _reported_losses(tmp_path)
    assert len([point for point in reported if "train/loss" in point]) == STEPS
    for point, expected in zip(reported, one_rank[kind].reported[: len(reported)], strict=True):
        # A KL divergence of models that are almost the same is what is left of log-probabilities around 5.
        assert point == pytest.approx(expected, rel=TOLERANCE, abs=1e-7)


def test_an_alignment_reports_the_error_of_every_replaced_layer(one_rank: dict[str, OneRank]) -> None:
    for kind, layers in (("align", [0, 1, 2]), ("76B align", [0, 1, 2, 3])):  # MODEL's last one is full
        for point in _steps_of(one_rank[kind]):
            errors = [point[f"align/error/layer_{layer}"] for layer in layers]
            assert len(point) == 2 + len(layers) and min(errors) > 0
            assert len(set(errors)) == len(layers)
            assert point["align/error"] == point["train/loss"]
            assert point["train/loss"] == pytest.approx(sum(errors) / len(layers), rel=1e-12)


def _steps_of(run: OneRank) -> list[dict[str, float]]:
    return [point for point in run.reported if "train/loss" in point]


def test_an_alignment_reports_what_its_start_left(one_rank: dict[str, OneRank]) -> None:
    first, *_ = one_rank["align"].reported
    fitted = [first[f"align/start/error/layer_{layer}"] for layer in (0, 2)]  # windows have nothing to fit
    assert first == {**first, "align/start/error": pytest.approx(sum(fitted) / 2)} and len(first) == 3
    assert all(0 < error < 1 for error in fitted)

    own, *_ = one_rank["align on its own inputs"].reported
    drifts = [own[f"align/start/drift/layer_{layer}"] for layer in (0, 1, 2)]
    assert len(own) == 3 + 3 and min(drifts) > 0


def test_a_mixed_loss_has_its_parts_beside_it(one_rank: dict[str, OneRank]) -> None:
    for point in one_rank["cpt"].reported:
        assert point["train/loss"] == point["train/cross_entropy"] and len(point) == 2
    for point in one_rank["distill"].reported:  # weight 0.6, temperature 2
        mixed = 0.4 * point["train/cross_entropy"] + 0.6 * 2**2 * point["train/kl_divergence"]
        assert point["train/loss"] == pytest.approx(mixed, rel=1e-12) and len(point) == 3
    for point in one_rank["76B"].reported:
        assert 1e-3 < point["train/loss"] - point["train/cross_entropy"] < 0.1


def test_every_kind_of_stage_learns(one_rank: dict[str, OneRank]) -> None:
    for kind, run in one_rank.items():
        steps = run.steps
        assert steps[-1][0] < 0.95 * steps[0][0], f"{kind} went from {steps[0][0]} to {steps[-1][0]}"


def test_micro_batches_and_recomputation_do_not_change_the_numbers(
    one_rank: dict[str, OneRank],
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

    (steps,) = ranks.run(train_and_not_save, config, STEPS, world_size=1, parallel=parallel)

    assert len(steps) == STEPS
    assert [loss for loss, _ in steps] == pytest.approx(
        [loss for loss, _ in one_rank["cpt"].steps[:STEPS]], rel=TOLERANCE
    )
