"""A run says first what it is, what it loaded and what has changed, and at its end what came out."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from spikingbrain_train.config.load import load_run_config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import LRDecayStyle, OptimizerConfig, Precision, RunConfig
from spikingbrain_train.config.run_record import fingerprint
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.plan_report.run import engine_facts
from spikingbrain_train.planning.resume import run_to_resume
from spikingbrain_train.planning.token_history import history_with
from spikingbrain_train.reporting.metrics import read_events, read_metrics
from spikingbrain_train.storage.checkpoint_folder import iteration_folder
from tests.distributed.pool import RankPool
from tests.distributed.sharding_engines import case, fsdp, zero
from tests.distributed.small_runs import MODEL, MODEL_76B, checkpoint_config, run_config, train

ONE = ParallelConfig()


def _lines(groups: ProcessGroups, config: RunConfig) -> list[str]:
    """Everything that a run prints; the sentence of its error, if it ends with one."""
    from spikingbrain_train.errors import SpikingBrainError

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            train(groups, config)
        except SpikingBrainError as error:
            print(f"error: {error}")
    return printed.getvalue().splitlines()


def _saying(lines: list[str], beginning: str) -> str:
    """The only line that begins so, with those below it that it is wrapped to; behind one another."""
    (number,) = (number for number, line in enumerate(lines) if line.startswith(beginning))
    below = itertools.takewhile(lambda line: line.startswith("  "), lines[number + 1 :])
    return " ".join(" ".join([lines[number], *below]).split())


def _config(output_dir: Path, text: Path, train_iters: int, optimizer: OptimizerConfig) -> RunConfig:
    stage = StageConfig(train_iters=train_iters, seq_length=32, global_batch_size=4)
    return run_config(output_dir, text, stage=stage, optimizer=optimizer)


def test_a_start_says_which_weights_it_has_and_what_is_fresh(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path
) -> None:
    config = _config(tmp_path / "random", text, 1, OptimizerConfig())
    (lines,) = ranks.run(_lines, config, world_size=1, parallel=ONE)
    assert _saying(lines, "weights") == "weights random, from seed=1234"
    config = replace(config, output_dir=str(tmp_path / "o"), checkpoint=checkpoint_config(hybrid_checkpoint))
    (lines,) = ranks.run(_lines, config, world_size=1, parallel=ONE)
    assert _saying(lines, "weights") == (
        f"weights of {hybrid_checkpoint} at iteration 1; optimizer, schedule and data order start anew"
    )


@pytest.mark.parametrize("parallel", [case(each, engine=each.engine) for each in (zero(2), fsdp())])
def test_the_first_lines_say_who_shards(
    parallel: ParallelConfig, ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    config = replace(
        _config(tmp_path / "run", text, 1, OptimizerConfig(lr_warmup_iters=0)), parallel=parallel
    )
    lines, _ = ranks.run(_lines, config, world_size=2, parallel=parallel)
    (engine,) = engine_facts(parallel)
    assert _saying(lines, "ranks").startswith(f"ranks 2 = 2 data, {engine}, on ")


def test_the_first_lines_say_what_is_trained_and_the_last_ones_what_came_out(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path, dense_checkpoint: Path
) -> None:
    config = _config(tmp_path / "run", text, 4, OptimizerConfig())
    config = replace(config, checkpoint=checkpoint_config(hybrid_checkpoint))
    config.data = replace(config.data, valid=[str(text)])
    config.logging = replace(config.logging, eval_interval=2, eval_iters=2)
    config.stage = replace(config.stage, kind="align", teacher=str(dense_checkpoint))

    lines, others = ranks.run(_lines, config, world_size=2, parallel=ONE)

    assert others == [], "one rank speaks for all"
    names = [line.split()[0] for line in lines if not line.startswith(" ")]
    first = ["stage", "model", "data", "held", "length", "tokens", "ranks", "output", "watch", "weights"]
    assert names[: len(first) + 1] == [*first, "iteration"]
    assert names[-8:] == ["saved", "finished", "time", "tokens", "loss", "held", "checkpoint", "next"]
    opening, closing = lines[: lines.index(_first(lines, "iteration"))], lines[-12:]
    assert _saying(opening, "stage") == (
        f"stage align: the mixers of 3 of 4 layers learn to reproduce the attention of {dense_checkpoint}"
    )
    assert _saying(opening, "model").endswith("train; 4 layers (2 gla + 1 swa + 1 full), hidden size 32")
    tokens = fingerprint(str(text)).tokens
    epochs = 4 * 4 * 32 / tokens
    assert _saying(opening, "data") == f"data {text}: {tokens / 1e3:.4g} k tokens, {epochs:.2f} epochs"
    assert _saying(opening, "held out") == (
        f"held out {text}: 256 tokens, evaluated at the start, every 2 steps and at the end"
    )
    assert _saying(opening, "length") == "length 4 steps of 4 sequences of 32 tokens, 512 tokens"
    read = "544 in all stages, 32 in one stage (cpt) before this one"  # a step of the checkpoint's own run
    assert _saying(opening, "tokens") == f"tokens at the end {read}"
    assert _saying(opening, "ranks").startswith("ranks 2 = 2 data, on ")
    assert _saying(opening, "ranks").endswith(", fp32")
    assert str(tmp_path / "run") in _saying(opening, "output")
    assert _saying(opening, "watch") == f"watch spikingbrain-plot {tmp_path / 'run'}"

    points = [point["valid/cross_entropy"] for point in read_metrics(tmp_path / "run") if len(point) == 3]
    assert _saying(closing, "finished").startswith("finished 4 steps, 512 tokens in ")
    share = float(_saying(closing, "time").split()[1].removesuffix("%"))
    assert 0 < share < 100 and _saying(closing, "time").endswith("starting, evaluating and 1 checkpoint")
    losses = [point["train/loss"] for point in read_metrics(tmp_path / "run") if "train/loss" in point]
    best = "" if losses[-1] == min(losses) else f"; the lowest reported was {min(losses):.4f}"
    assert _saying(closing, "loss") == f"loss {losses[-1]:.4f} in the last step{best}"
    assert _saying(closing, "tokens") == f"tokens {read}"
    assert _saying(closing, "held out") == f"held out cross entropy {points[0]:.4f} -> {points[-1]:.4f}"
    checkpoints = tmp_path / "run" / "checkpoints"
    assert _saying(closing, "checkpoint") == f"checkpoint {checkpoints / 'iter_0000004'}"
    assert [line[12:] for line in lines[-2:]] == [
        f"spikingbrain-train stage=distill stage.teacher=... checkpoint.load={checkpoints} output_dir=... "
        "data.train=[...]",
        f"spikingbrain-evaluate --model {checkpoints} --data {text} --seq-length 32",
    ]
    details = (tmp_path / "run" / "run_details.txt").read_text()
    assert "patches of torch " in details and "kernels: gated linear attention chunk" in details
    assert not any("patches" in line or "kernels" in line for line in lines)


def _first(lines: list[str], beginning: str) -> str:
    return next(line for line in lines if line.startswith(beginning))


def test_the_last_lines_offer_an_export(ranks: RankPool, tmp_path: Path, text: Path) -> None:
    def commands(model: ModelConfig) -> list[str]:
        config = _config(tmp_path / str(len(model.mixers)), text, 1, OptimizerConfig())
        (lines,) = ranks.run(_lines, replace(config, model=model), world_size=1, parallel=ONE)
        return [line[12:] for line in lines[lines.index(_first(lines, "checkpoint")) + 1 :]]

    for model in (MODEL, MODEL_76B):
        run = tmp_path / str(len(model.mixers))
        assert commands(model) == [
            f"spikingbrain-export --checkpoint {run / 'checkpoints'} --output {run / 'export'}"
        ]


def test_a_changed_rate_is_said_used_and_recorded(ranks: RankPool, tmp_path: Path, text: Path) -> None:
    # min_lr as in the preset, above the later rate: it has no part in a constant schedule.
    constant = OptimizerConfig(lr=1e-3, min_lr=5e-5, lr_decay_style=LRDecayStyle.constant)
    ranks.run(train, _config(tmp_path, text, 2, constant), world_size=1, parallel=ONE)

    changed = _config(tmp_path, text, 4, replace(constant, lr=1e-5, new_parameter_lr_mult=10.0))
    (lines,) = ranks.run(_lines, changed, world_size=1, parallel=ONE)

    assert _saying(lines, "resumed").endswith(
        "iter_0000002 at iteration 2 with its weights, optimizer, schedule, position in the data and random "
        "generators (8 sequences read)"
    )
    assert _saying(lines, "changed") == (
        "changed since the checkpoint: optimizer.lr 0.001 -> 1e-05, optimizer.new_parameter_lr_mult 1 -> 10, "
        "stage.train_iters 2 -> 4, so that the learning rate of step 3 is 1e-05 instead of 0.001"
    )
    rates = [point["train/learning_rate"] for point in read_metrics(tmp_path) if "train/loss" in point]
    assert rates == [1e-3, 1e-3, 1e-5, 1e-5]
    stored = load_run_config(iteration_folder(tmp_path / "checkpoints", 4) / "run_config.yaml")
    assert (stored.optimizer.lr, stored.optimizer.new_parameter_lr_mult) == (1e-5, 10.0)


def test_another_global_batch_goes_on_behind_the_last_sequence(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    run = tmp_path / "run"
    ranks.run(train, _config(run, text, 2, OptimizerConfig()), world_size=2, parallel=ONE)
    larger = _config(run, text, 4, OptimizerConfig())
    larger.stage = replace(larger.stage, global_batch_size=6)
    (lines,) = ranks.run(_lines, larger, world_size=1, parallel=ONE)

    assert "iteration 2" in _saying(lines, "resumed") and "(8 sequences read)" in _saying(lines, "resumed")
    assert "stage.global_batch_size 4 -> 6 (the data go on behind the last sequence read" in _saying(
        lines, "changed"
    )
    assert _saying(lines, "length") == (
        "length 4 steps, those behind step 2 of 6 sequences of 32 tokens, 640 tokens"
    )
    assert _first(lines, "tokens").split() == ["tokens", "at", "the", "end", "640", "in", "all", "stages"]
    # A later start, and a later stage, count both batches.
    stored = run_to_resume(larger)
    assert stored is not None and stored.consumed_samples == 2 * 4 + 2 * 6
    (lines,) = ranks.run(_lines, replace(larger), world_size=1, parallel=ONE)
    assert "(20 sequences read)" in _saying(lines, "resumed")
    assert [stage.tokens for stage in history_with(stored.checkpoint).stages] == [20 * 32]


def test_the_metrics_file_says_where_a_run_started_and_went_on(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path
) -> None:
    config = _config(tmp_path / "run", text, 2, OptimizerConfig(lr=1e-3))
    config = replace(config, checkpoint=checkpoint_config(hybrid_checkpoint))
    config.data = replace(config.data, valid=[str(text)])
    ranks.run(train, config, world_size=1, parallel=ONE)
    longer = replace(config, stage=replace(config.stage, train_iters=4), optimizer=OptimizerConfig(lr=1e-4))
    longer.logging.eval_iters = 3
    ranks.run(train, longer, world_size=2, parallel=ONE)

    started, resumed = read_events(tmp_path / "run")
    assert started["event"] == "started" and "changed" not in started
    assert started["run"] == {
        "output_dir": str(tmp_path / "run"),
        "stage": "cpt",
        "load": str(iteration_folder(hybrid_checkpoint, 1)),
        # 2 global batches of 4 windows of 32 tokens
        "held_out": {"assignment": {"tokens": 2 * 4 * 32, "fingerprint": fingerprint(str(text)).digest}},
        "seq_length": 32,
        "world_size": 1,
    }
    assert (resumed["event"], resumed["iteration"], resumed["run"]["world_size"]) == ("resumed", 2, 2)
    assert resumed["run"]["held_out"]["assignment"]["tokens"] == 3 * 4 * 32
    assert resumed["changed"] == {
        "parallel.data_parallel_size": [1, 2],
        "optimizer.lr": [1e-3, 1e-4],
        "stage.train_iters": [2, 4],
        "logging.eval_iters": [2, 3],
    }


def test_a_longer_schedule_says_to_which_rate_it_lifts_the_next_step(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    cosine = OptimizerConfig(lr=1e-3, min_lr=5e-5, lr_decay_style=LRDecayStyle.cosine)
    ranks.run(train, _config(tmp_path, text, 2, cosine), world_size=1, parallel=ONE)
    (finished,) = ranks.run(_lines, _config(tmp_path, text, 2, cosine), world_size=1, parallel=ONE)
    assert _saying(finished, "changed") == "changed since the checkpoint: nothing"
    nothing_left = "finished nothing is left to do: "
    assert _saying(finished, "finished").startswith(nothing_left)
    assert "is at iteration 2 of stage.train_iters=2" in _saying(finished, "finished")

    longer = _config(tmp_path, text, 4, cosine)
    lines, _ = ranks.run(_lines, longer, world_size=2, parallel=ONE)

    expected = 5e-5 + 0.5 * (1 + math.cos(math.pi * 3 / 4)) * (1e-3 - 5e-5)
    assert "random generators start anew" in _saying(lines, "resumed")
    assert _saying(lines, "changed") == (
        "changed since the checkpoint: parallel.data_parallel_size 1 -> 2, stage.train_iters 2 -> 4, "
        f"so that the learning rate of step 3 is {expected:.3g} instead of 5e-05"
    )
    rates = [point["train/learning_rate"] for point in read_metrics(tmp_path) if "train/loss" in point]
    assert rates[2] == pytest.approx(expected)


def test_a_resumed_run_needs_nothing_of_what_it_started_from(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(hybrid_checkpoint, source)
    (iteration_folder(source, 1) / "hf_source").mkdir()
    (iteration_folder(source, 1) / "hf_source" / "config.json").write_text("{}")
    config = _config(tmp_path / "o", text, 1, OptimizerConfig())
    config = replace(config, checkpoint=checkpoint_config(source))
    ranks.run(train, config, world_size=1, parallel=ONE)
    shutil.rmtree(source)

    longer = replace(config, stage=replace(config.stage, train_iters=2))
    assert len(ranks.run(train, longer, world_size=1, parallel=ONE)[0]) == 1

    assert (iteration_folder(tmp_path / "o" / "checkpoints", 2) / "hf_source" / "config.json").is_file()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"precision": Precision.bf16}, "was written with precision=fp32 and cannot be resumed with bf16"),
        ({"seed": 99}, "was written with seed=1234 and cannot be resumed with 99"),
    ],
)
def test_a_run_that_must_not_go_on_is_refused_on_every_rank(
    change: dict[str, object], part: str, ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    config = _config(tmp_path, text, 1, OptimizerConfig())
    ranks.run(train, config, world_size=1, parallel=ONE)
    longer = replace(config, stage=replace(config.stage, train_iters=2), **change)
    for lines in ranks.run(_lines, longer, world_size=2, parallel=ONE):
        assert part in _saying(lines, "error: ")
