"""Batches that are not to be learnt from: left out on all ranks, written down, gone back from, given up on.

The faults are made by wrapping what the trainer reads and computes; nothing of the checks is touched.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import EngineKind, ParallelConfig
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.errors import NumericalError
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.metrics import read_metrics
from spikingbrain_train.storage.checkpoint_folder import iterations
from spikingbrain_train.training.callbacks.callback import Callback, SkipUpdate
from tests.distributed.pool import RankPool
from tests.distributed.sharding_engines import case, fsdp
from tests.distributed.small_runs import MODEL, MODEL_76B, behind_gradients, checkpoint_config, run_config

NAN = float("nan")


class _Watch(Callback):
    """Weights and moments of this rank after every step and save, as checksums."""

    def __init__(self) -> None:
        self.after_step: dict[int, float] = {}
        self.saved: dict[str, float] = {}
        self.losses: dict[int, float] = {}

    def _state(self) -> float:
        from spikingbrain_train.checkpoint.optimizer_state import chain_of
        from spikingbrain_train.parallel.own_part import own_part

        state = self.run.state
        state.gather_updated_weights()
        found = [own_part(parameter).double().sum() for parameter in state.model.parameters()]
        for part in chain_of(state.optimizer):
            for of_parameter in part.optimizer.state.values():
                found += [of_parameter[name].double().sum() for name in ("exp_avg", "exp_avg_sq", "step")]
        return float(sum(found))

    def start(self) -> None:
        self.after_step[self.run.state.iteration] = self._state()

    def report_due(self, report: Any) -> None:
        self.losses[report.iteration] = report.metrics["train/loss"]

    def step_end(self) -> None:
        self.after_step[self.run.state.iteration] = self._state()

    def after_save(self, folder: Path) -> None:
        self.saved[folder.name] = self._state()


def _spoil_samples(trainer: Any, spoilt: dict[int, str | int]) -> None:
    """Training samples carry a NaN ``always``, or in the ``first`` reading only, or one label throughout."""
    read = trainer.data.train_batches

    def train_batches(consumed_samples: int) -> Iterator[Any]:
        for batch in read(consumed_samples):
            for row, seed in enumerate(batch.layout.sequence_seeds):
                number = int(seed.split("/")[1])
                how = spoilt.get(number)
                if isinstance(how, int):
                    batch.labels[row] = how
                elif how is not None:
                    batch.loss_mask[row, 1] = NAN
                if how == "first":
                    del spoilt[number]
            yield batch

    trainer.data.train_batches = train_batches


def _spoil_gradient(trainer: Any, groups: ProcessGroups, steps: tuple[int, ...]) -> None:
    """A gradient of the last rank is NaN the first time that a step is computed."""
    left = list(steps)

    def spoil() -> None:
        if trainer.state.iteration + 1 in left:
            left.remove(trainer.state.iteration + 1)
            if groups.rank == groups.world_size - 1:
                next(trainer.engine.gradients()).view(-1)[0] = NAN

    behind_gradients(trainer, spoil)


def _train(
    groups: ProcessGroups,
    config: RunConfig,
    spoilt: dict[int, str | int],
    gradient_steps: tuple[int, ...] = (),
) -> tuple[_Watch, str, int, int]:
    """What was seen, the sentence that ended the run, its iteration and its samples."""
    from spikingbrain_train.training.trainer import Trainer

    watch, sentence = _Watch(), ""
    trainer = Trainer(config, groups, [watch])
    _spoil_samples(trainer, spoilt)
    _spoil_gradient(trainer, groups, gradient_steps)
    try:
        trainer.train()
    except NumericalError as error:
        sentence = str(error)
    state = trainer.state
    del watch.run
    return watch, sentence, state.iteration, state.consumed_samples


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "bad_batches.jsonl").read_text().splitlines()]


OVERLAPPED = ParallelConfig(
    use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
)


@pytest.mark.parametrize(
    ("parallel", "model", "first_reader"),
    [
        (OVERLAPPED, MODEL, 1),
        (ParallelConfig(pipeline_model_parallel_size=2), MODEL, 1),
        (ParallelConfig(expert_model_parallel_size=2), MODEL_76B, 1),
        case(fsdp(), MODEL_76B, 1, engine=EngineKind.fsdp),
    ],
    ids=["DP 2, overlapped distributed optimizer", "PP 2", "EP 2", "FSDP, DP 2"],
)
def test_a_bad_batch_changes_nothing_and_its_samples_are_written_down(
    parallel: ParallelConfig,
    model: ModelConfig,
    first_reader: int,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
) -> None:
    config = run_config(tmp_path, text, model=model, parallel=parallel)
    config.stage = replace(config.stage, train_iters=6)
    # Step 2 reads a NaN once, step 4 every time; a gradient of step 5 is NaN once.
    found = ranks.run(_train, config, {5: "first", 13: "always"}, (5,), world_size=2, parallel=parallel)
    for watch, sentence, iteration, consumed in found:
        assert sentence == "" and iteration == 6 and consumed == 24
        states = watch.after_step
        assert states[1] == states[2] and states[3] == states[4] == states[5]
        assert len(set(states.values())) == 4
        assert list(watch.losses) == [1, 3, 6]
    once, always, gradient = _lines(tmp_path)
    assert [each["iteration"] for each in (once, always, gradient)] == [2, 4, 5]
    assert once["reason"] == always["reason"] == "the loss became nan"
    assert gradient["reason"] == "the gradient norm became nan"
    for line in (once, always):
        first = 4 * (line["iteration"] - 1)
        assert sorted({s for each in line["read"] for s in each["samples"]}) == list(range(first, first + 4))
        spoilt = [each for each in line["read"] if not each["losses_are_finite"]]
        assert [each["rank"] for each in spoilt] == [1]
        assert {5: "first", 13: "always"}.keys() & set(spoilt[0]["samples"])
        assert [origin["sample"] for origin in line["origins"]] == list(range(first, first + 4))
    assert "hardware or nondeterminism suspected on rank 1" in once["computed_again"]
    assert once["suspected_ranks"] == [1]
    assert "the data or the weights" in always["computed_again"] and always["suspected_ranks"] == []
    assert "hardware or nondeterminism" in gradient["computed_again"]
    reported = [point["train/skipped_batches"] for point in read_metrics(tmp_path) if "train/loss" in point]
    assert reported == [0, 1, 3]
    assert iterations(tmp_path / "checkpoints") == [6]


@pytest.mark.parametrize(
    ("kind", "parallel"),
    [
        ("align", ParallelConfig(pipeline_model_parallel_size=2)),
        ("distill", ParallelConfig()),
        case("align", fsdp(), engine=EngineKind.fsdp),
    ],
    ids=["align, PP 2", "distill, DP 2", "align, FSDP"],
)
def test_so_it_is_in_stages_that_learn_from_a_teacher(
    kind: str,
    parallel: ParallelConfig,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
    dense_checkpoint: Path,
) -> None:
    config = run_config(tmp_path, text, parallel=parallel, checkpoint=checkpoint_config(hybrid_checkpoint))
    config.stage = replace(config.stage, kind=kind, train_iters=4, teacher=str(dense_checkpoint))
    config.stage.alignment.calibration_tokens = 0
    for watch, sentence, iteration, _ in ranks.run(_train, config, {}, (2,), world_size=2, parallel=parallel):
        states = watch.after_step
        assert sentence == "" and iteration == 4 and states[1] == states[2]
        assert len(set(states.values())) == 4
    [line] = _lines(tmp_path)
    assert line["iteration"] == 2 and "hardware or nondeterminism" in line["computed_again"]


@pytest.mark.slow
def test_one_batch_in_a_hundred_that_is_bad_costs_nothing_that_shows(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    model, ends = replace(MODEL, num_layers=2, mixers=["gla", "full"]), {}
    for name, spoilt in (("clean", {}), ("bad", {2 * 49 + 1: "always"})):
        config = run_config(tmp_path / name, text, model=model)
        config.data.valid = [str(text)]
        config.stage = replace(config.stage, train_iters=100, global_batch_size=2)
        config.logging.log_interval, config.logging.eval_iters = 50, 16
        ranks.run(_train, config, spoilt, world_size=2, parallel=ParallelConfig())
        ends[name] = read_metrics(tmp_path / name)[-1]["valid/cross_entropy"]
    [line] = _lines(tmp_path / "bad")
    assert line["iteration"] == 50
    # Another seed, and with it another order of the data, ends 0.007 away.
    assert abs(ends["bad"] - ends["clean"]) < 0.006, ends
    for line in read_metrics(tmp_path / "bad"):
        assert None not in line.values(), "no NaN is reported"


def test_bad_batches_in_a_row_take_weights_back_and_data_go_on(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    parallel = OVERLAPPED
    config = run_config(tmp_path, text, parallel=parallel, precision=Precision.bf16)
    config.stage = replace(config.stage, train_iters=9)
    config.checkpoint.save_interval, config.checkpoint.keep_last = 2, 2
    config.numerics.roll_back_after = 2
    spoilt = {4 * (step - 1): "always" for step in (4, 5)}
    found = ranks.run(_train, config, spoilt, world_size=2, parallel=parallel)
    for watch, sentence, iteration, consumed in found:
        states = watch.after_step
        assert sentence == "" and (iteration, consumed) == (9, 36)
        assert states[3] == states[4] != states[2]
        assert states[5] == states[2] == watch.saved["iter_0000002"]
        assert len({states[step] for step in (5, 6, 7, 8, 9)}) == 5, "and it learns on"
        # Nothing is saved while it is unsure whether the weights are good.
        assert list(watch.saved) == ["iter_0000002", "iter_0000006", "iter_0000008", "iter_0000009"]
    points = read_metrics(tmp_path)
    assert points[-1]["train/rollbacks"] == 1 and points[-1]["train/skipped_batches"] == 2

    # What was counted goes on in another start, which ends on every rank at the third bad batch.
    config.stage = replace(config.stage, train_iters=12)
    config.numerics.stop_after = 3
    found = ranks.run(_train, config, {4 * 10: "always"}, world_size=2, parallel=parallel)
    for _, sentence, iteration, _ in found:
        assert iteration == 10
        assert (
            sentence.startswith("3 of the last 500 batches were bad") and "numerics.stop_after=3" in sentence
        )
        assert "the loss became nan at iteration 11" in sentence and "iter_0000010" in sentence
    assert iterations(tmp_path / "checkpoints") == [9, 10]


def _train_while_a_save_takes_long(
    groups: ProcessGroups, config: RunConfig, spoilt: dict[int, str | int]
) -> tuple[_Watch, str, int, int]:
    """Of every checkpoint this rank's files are read back for a second, in which many steps fit."""
    from spikingbrain_train.checkpoint import saving

    def take_long(folder: Path) -> Any:
        time.sleep(1.0)
        return checksums_of_rank(folder)

    checksums_of_rank = saving.checksums_of_rank
    saving.checksums_of_rank = take_long
    try:
        return _train(groups, config, spoilt)
    finally:
        saving.checksums_of_rank = checksums_of_rank


def test_weights_go_back_to_a_checkpoint_that_is_still_being_written_and_somebody_is_told(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    parallel = ParallelConfig(use_distributed_optimizer=True)
    config = run_config(tmp_path, text, parallel=parallel)
    config.stage = replace(config.stage, train_iters=6)
    config.checkpoint.async_save, config.checkpoint.save_interval = True, 2
    config.numerics.roll_back_after = 1
    write_down = (
        "import os, sys; open(os.environ['ALERT_OUTPUT_DIR'] + '/' + sys.argv[1], 'w').write(sys.argv[2])"
    )
    config.logging.alert_command = shlex.join([sys.executable, "-c", write_down])
    spoilt = {4 * (4 - 1): "always"}
    found = ranks.run(_train_while_a_save_takes_long, config, spoilt, world_size=2, parallel=parallel)
    for watch, sentence, iteration, _ in found:
        states = watch.after_step
        assert sentence == "" and iteration == 6
        assert states[4] == states[2] != states[3]
        assert len({states[step] for step in (4, 5, 6)}) == 3, "and it learns on"
        assert list(watch.saved) == ["iter_0000002", "iter_0000005", "iter_0000006"]
    told = (tmp_path / "bad batch").read_text()
    assert told.startswith("iteration 4 updates nothing, because the loss became nan") and "12 to 16" in told
    assert "are again those of iteration 2" in (tmp_path / "bad batches in a row").read_text()


def test_weights_go_back_further_where_trouble_stays(ranks: RankPool, tmp_path: Path, text: Path) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    config = run_config(tmp_path, text, parallel=parallel)
    config.stage = replace(config.stage, train_iters=8)
    config.checkpoint.save_interval, config.numerics.roll_back_after = 1, 1
    spoilt = {4 * (step - 1): "always" for step in (4, 5, 6)}
    for watch, sentence, iteration, _ in ranks.run(_train, config, spoilt, world_size=2, parallel=parallel):
        states = watch.after_step
        assert sentence == "" and iteration == 8
        assert states[4] == states[3] and states[5] == states[2] and states[6] == states[1] != states[7]


def test_a_run_without_a_checkpoint_to_go_back_to_ends(ranks: RankPool, tmp_path: Path, text: Path) -> None:
    config = run_config(tmp_path, text)
    config.numerics.roll_back_after = 2
    spoilt = {4 * (step - 1): "always" for step in (3, 4)}
    for _, sentence, iteration, _ in ranks.run(
        _train, config, spoilt, world_size=2, parallel=ParallelConfig()
    ):
        assert iteration == 3 and "2 bad batches in a row: no older checkpoint is there" in sentence
        assert "lower optimizer.lr" in sentence


def test_a_spike_of_the_loss_is_left_out_once_the_median_is_known(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    config = run_config(tmp_path, text)
    config.stage = replace(config.stage, train_iters=9)
    config.numerics = replace(
        config.numerics, spike_factor=1.2, spike_margin=0.1, spike_window=5, spike_warmup=4
    )
    # Tokens that the text lacks, another one each time.
    rare = {sample: step for step in (3, 8) for sample in range(4 * (step - 1), 4 * step)}
    found = ranks.run(_train, config, rare, world_size=2, parallel=ParallelConfig())
    for watch, sentence, *_ in found:
        states = watch.after_step
        assert sentence == "" and states[8] == states[7] != states[6]
        assert len(set(states.values())) == 9, (
            "the third step is a spike, too, and too early to be known as one"
        )
    [line] = _lines(tmp_path)
    assert line["iteration"] == 8 and "is a spike above the median of" in line["reason"]
    assert "the data or the weights" in line["computed_again"]


class _SkipsTheSecond(Callback):
    """Another package's reason to leave a batch out."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def before_update(self, grad_norm: float) -> None:
        if self.run.state.iteration == 1:
            raise SkipUpdate("somebody said so")

    def update_skipped(self, skipped: SkipUpdate) -> None:
        self.told.append(str(skipped))


def _train_with_a_skip(groups: ProcessGroups, config: RunConfig) -> tuple[list[str], dict[int, float]]:
    from spikingbrain_train.training.trainer import Trainer

    skips, watch = _SkipsTheSecond(), _Watch()
    Trainer(config, groups, [skips, watch]).train()
    return skips.told, watch.after_step


def test_a_callback_of_another_package_can_leave_a_batch_out(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    config = run_config(tmp_path, text)
    config.stage = replace(config.stage, train_iters=3)
    [(told, states)] = ranks.run(_train_with_a_skip, config, world_size=1, parallel=ParallelConfig())
    assert told == ["somebody said so"] and states[0] != states[1] == states[2] != states[3]
    [line] = _lines(tmp_path)
    assert line["iteration"] == 2 and line["reason"] == "somebody said so" and line["computed_again"] is None


def test_weights_that_never_were_good_end_the_run_at_once(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    config = run_config(tmp_path, text)
    spoilt = {sample: "always" for sample in range(40)}
    for watch, sentence, iteration, _ in ranks.run(
        _train, config, spoilt, world_size=2, parallel=ParallelConfig()
    ):
        assert iteration == 2 and len(set(watch.after_step.values())) == 1
        assert sentence.startswith("the first 3 batches were bad; of the last, the loss became nan")
        assert "no step has changed the weights yet" in sentence
    assert not (tmp_path / "checkpoints").exists() or iterations(tmp_path / "checkpoints") == []
