"""A callback and an evaluator of another package, in whole runs: every hook, reports, checkpoints, ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.metrics import read_metrics
from tests.distributed.pool import RankFailure, RankPool
from tests.distributed.small_runs import run_config, train
from tests.programs import Programs

REPOSITORY = Path(__file__).resolve().parents[2]
OURS = "tests.training.callbacks.count_steps"


def _train(programs: Programs, folder: Path, text: Path, *arguments: str) -> str:
    settings = [
        *("model=tiny_hybrid", "model.vocab_size=130", "cluster=cpu", "precision=fp32", "parallel=single"),
        *(f"data.train=[{text}]", f"data.valid=[{text}]", "logging.eval_iters=1", "stage.seq_length=32"),
        *(f"output_dir={folder}", "stage.global_batch_size=2", "logging.log_interval=2"),
        *("logging.tensorboard=false", "cluster.peak_tflops=1", "checkpoint.save_interval=2"),
    ]
    result = programs.run(["train.py", *settings, *arguments], REPOSITORY, said_in=folder.parent)
    assert result.code == 0, result.said
    return result.output


STEP = ["step_begin", "vote", "agreed on 0", "before_update"]
NAMED = (
    f"callbacks=[{{path: {OURS}.CountSteps, settings: {{first: 100}}}}]",
    f"logging.evaluators=[{{path: {OURS}.OwnNumber, settings: {{value: 2.5}}}}]",
)


@pytest.mark.slow
def test_a_callback_of_another_package_hangs_on_a_whole_run_and_its_state_goes_on(
    programs: Programs, tmp_path: Path, text: Path
) -> None:
    run = tmp_path / "run"
    _train(programs, run, text, "stage.train_iters=2", *NAMED)
    first = json.loads((run / "counted_0.json").read_text())
    assert first["steps"] == 102
    evaluated = ["before_evaluation", "after_evaluation"]
    assert first["called"] == [
        *("start at 0", *evaluated, "log of 0"),
        *(*STEP, "step_end"),
        *(*STEP, "report_due", "log of 2", "step_end", *evaluated, "log of 2"),
        *("before_save", "after_snapshot", "after_save of iter_0000002"),
    ]

    output = _train(programs, run, text, "stage.train_iters=4", *NAMED)
    second = json.loads((run / "counted_0.json").read_text())
    assert "changed     since the checkpoint: stage.train_iters 2 -> 4" in output
    assert second["steps"] == 104 and second["called"][0] == "start at 2"
    points = read_metrics(run)
    losses = [point["train/loss"] for point in points if "train/loss" in point]
    assert second["loss"] == pytest.approx(sum(losses), rel=1e-6) and len(losses) == 2
    assert [point["count/steps"] for point in points if "train/loss" in point] == [102, 104]
    evaluations = [point for point in points if "valid/cross_entropy" in point]
    assert [point["own/iteration"] for point in evaluations] == [0, 2, 4]
    assert all(point["own/value"] == 2.5 for point in evaluations)

    output = _train(programs, run, text, "stage.train_iters=5")
    assert f"state of {OURS}.CountSteps is left out" in output and "callbacks [" in output


def test_all_ranks_vote_and_take_up_what_the_main_process_saved(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    config = run_config(tmp_path, text, parallel=parallel, callbacks=[f"{OURS}.CountSteps"])
    for train_iters in (3, 4):
        config.stage.train_iters = train_iters
        ranks.run(train, config, world_size=2, parallel=parallel)
        for rank in range(2):
            counted = json.loads((tmp_path / f"counted_{rank}.json").read_text())
            assert counted["steps"] == train_iters and "agreed on 1" in counted["called"]
            assert ("log of 4" in counted["called"]) == (train_iters == 4 and rank == 0)


def test_a_state_that_no_checkpoint_can_hold_is_a_sentence_before_the_first_step(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    config = run_config(tmp_path, text, callbacks=[f"{OURS}.KeepsAnObject"])
    with pytest.raises(RankFailure, match="KeepsAnObject, whose state_dict holds a PosixPath; a checkpoint"):
        ranks.run(train, config, world_size=1, parallel=ParallelConfig())
    assert not (tmp_path / "metrics.jsonl").exists()


def _reductions(groups: ProcessGroups, config: RunConfig) -> list[int]:
    """The steps whose losses were reduced over ranks."""
    from spikingbrain_train.training.trainer import Trainer

    trainer, steps = Trainer(config, groups), []
    reduce = ProcessGroups.sum_from_last_stage

    def noted(self: ProcessGroups, values: Any) -> Any:
        steps.append(trainer.state.iteration)
        return reduce(self, values)

    ProcessGroups.sum_from_last_stage = noted  # type: ignore[method-assign]
    try:
        trainer.train()
    finally:
        ProcessGroups.sum_from_last_stage = reduce  # type: ignore[method-assign]
    return steps


def test_losses_are_reduced_when_they_are_reported_and_in_no_other_step(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    config = run_config(tmp_path, text)
    config.logging.log_interval = 4
    for steps in ranks.run(_reductions, config, world_size=2, parallel=ParallelConfig()):
        assert steps == [4, 8, 10]
