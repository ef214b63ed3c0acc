"""What is reported as the loss is what is optimised, and held-out losses are told apart by dataset."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from spikingbrain_train.config.model import ModelConfig, MoEConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import DataConfig, LoggingConfig, RunConfig
from spikingbrain_train.config.stage import DistillationConfig
from spikingbrain_train.data.indexed import IndexedDatasetWriter, open_indexed_dataset
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.metrics import read_events, read_metrics
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import (
    MODEL,
    MODEL_76B,
    TOPOLOGIES,
    ByteTokenizer,
    checkpoint_config,
    run_config,
    train,
)

ONE = ParallelConfig()
EXPERTS = replace(
    MODEL_76B, moe=MoEConfig(num_experts=4, router_topk=2, aux_loss_coeff=0.5, z_loss_coeff=0.05)
)


def _descent(groups: ProcessGroups, config: RunConfig, step: float) -> tuple[float, float]:
    """How far the reported loss falls a small step along its gradient, and the step times |gradient|^2."""
    import torch

    from spikingbrain_train.training.trainer import Trainer

    trainer = Trainer(config, groups)
    batches = list(_take(trainer.data.train_batches(0), config.stage.global_batch_size))
    if trainer.stage.teacher is not None:  # which differs little from the student: both are almost random
        logits = trainer.stage.teacher.output_weight().data
        logits.copy_(30 * logits.flip(0))
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]

    def loss_and_gradient() -> float:
        trainer.model.zero_grad_buffer()
        losses = trainer.stage.forward_backward(trainer.model, iter(batches), len(batches))
        return losses.reduced()["train/loss"]

    before = loss_and_gradient()
    expected = 0.0
    with torch.no_grad():
        for parameter in parameters:
            gradient = parameter.main_grad
            expected += gradient.double().square().sum().item()
            parameter -= step * gradient
    return before - loss_and_gradient(), step * expected


def _take(batches: Iterator[Any], number: int) -> Iterator[Any]:
    for _ in range(number):
        yield next(batches)


@pytest.mark.parametrize(
    ("model", "weight"),
    [(MODEL, 0.0), (MODEL, 1.0), (EXPERTS, 0.0), (EXPERTS, 0.9)],
    ids=["cross entropy", "distillation", "experts", "distillation and experts"],
)
def test_the_reported_loss_is_the_one_whose_gradient_trains(
    model: ModelConfig,
    weight: float,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
    hybrid_76b_checkpoint: Path,
    dense_checkpoint: Path,
) -> None:
    load = hybrid_checkpoint if model is MODEL else hybrid_76b_checkpoint
    config = run_config(tmp_path, text, model=model, checkpoint=checkpoint_config(load))
    if weight:
        config.stage.kind = "distill"
        config.stage.distillation = DistillationConfig(weight=weight, temperature=2.0)
        config.stage.teacher = str(dense_checkpoint)
    ((fell, expected),) = ranks.run(_descent, config, 1e-4, world_size=1, parallel=ONE)
    # First order in a small step; leaving out any part of the loss is off by more than that.
    assert fell == pytest.approx(expected, rel=0.02)


def _write(folder: Path, name: str, documents: list[str]) -> str:
    tokenizer = ByteTokenizer()
    staging = folder / f"staging_{name}"
    staging.mkdir(parents=True)
    writer = IndexedDatasetWriter(folder / name, tokenizer, staging)
    for document in documents:
        tokens = numpy.asarray(tokenizer.encode(document), dtype=writer.dtype)
        writer.add_document(tokens, text_bytes=len(tokens))
    writer.finish()
    writer.publish()
    return str(folder / name)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three datasets of 7, 1 and 3 windows of 32 tokens."""
    folder = tmp_path_factory.mktemp("held_out")
    digits = "".join(str(number) for number in range(100))
    return [
        _write(folder / "a", "valid", [digits[:100], digits[:110]]),
        _write(folder / "b", "valid", ["short"]),
        _write(folder, "letters", ["abcdefgh" * 11]),
    ]


def _evaluation(
    folder: Path, text: Path, load: Path, valid: list[str], eval_iters: int = 16, **changes: Any
) -> RunConfig:
    config = run_config(
        folder,
        text,
        checkpoint=checkpoint_config(load),
        logging=LoggingConfig(eval_iters=eval_iters, tensorboard=False),
    )
    config.data = DataConfig(train=[str(text)], valid=valid, reset_at_documents=True)
    config.stage = replace(config.stage, train_iters=1, **changes)
    config.optimizer.lr_warmup_iters = 0
    return config


def _evaluate(ranks: RankPool, config: RunConfig, topology: str | None = None) -> dict[str, float]:
    world_size, parallel = (1, ONE) if topology is None else TOPOLOGIES[topology]
    config.parallel = parallel
    ranks.run(train, config, world_size=world_size, parallel=parallel)
    points = read_metrics(config.output_dir)
    return {name: value for name, value in points[0].items() if name.startswith("valid/")}


def test_every_held_out_dataset_has_its_own_loss_and_the_total_is_that_of_all_tokens(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path, held_out: list[str]
) -> None:
    config = _evaluation(tmp_path / "all", text, hybrid_checkpoint, held_out, micro_batch_size=2)
    found = _evaluate(ranks, config)
    names = ["a/valid", "b/valid", "letters"]
    assert list(found) == ["valid/cross_entropy", *(f"valid/cross_entropy/{name}" for name in names)]
    (started,) = read_events(tmp_path / "all")
    tokens = [started["run"]["held_out"][name]["tokens"] for name in names]
    labels = [open_indexed_dataset(prefix).num_tokens - 1 for prefix in held_out]
    assert tokens == [labels[0] - 1, *labels[1:]]  # the second document's first token is not predicted
    values = [found[f"valid/cross_entropy/{name}"] for name in names]
    total = sum(value * count for value, count in zip(values, tokens, strict=True)) / sum(tokens)
    assert found["valid/cross_entropy"] == pytest.approx(total, rel=1e-7)
    for number, (prefix, value) in enumerate(zip(held_out, values, strict=True)):
        alone = _evaluate(ranks, _evaluation(tmp_path / str(number), text, hybrid_checkpoint, [prefix]))
        assert list(alone) == ["valid/cross_entropy"]
        assert value == pytest.approx(alone["valid/cross_entropy"], rel=1e-6)


DIFFERENT_SPLITS = (
    "DP 2",
    "PP 2",
    "TP 2 + sequence parallel x CP 2",
    "TP 2 + sequence parallel x DP 2, overlapped distributed optimizer",
)


@pytest.mark.parametrize("topology", DIFFERENT_SPLITS)
def test_held_out_losses_equal_those_of_one_rank(
    topology: str, ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path, held_out: list[str]
) -> None:
    one = _evaluate(ranks, _evaluation(tmp_path / "one", text, hybrid_checkpoint, held_out))
    split = _evaluate(ranks, _evaluation(tmp_path / "split", text, hybrid_checkpoint, held_out), topology)
    assert split == pytest.approx(one, rel=1e-6)


def _printed(groups: ProcessGroups, config: RunConfig) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train(groups, config)
    return " ".join(printed.getvalue().split())


def test_a_dataset_that_no_evaluation_reaches_has_no_loss_and_is_named(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path, held_out: list[str]
) -> None:
    config = _evaluation(tmp_path, text, hybrid_checkpoint, held_out, eval_iters=2)  # 8 windows
    (printed,) = ranks.run(_printed, config, world_size=1, parallel=ONE)
    assert f"not read: {held_out[2]}, before which logging.eval_iters=2 ends; 3 reads all" in printed
    assert "held out cross entropy" in printed and "(a/valid " in printed
    evaluations = [point for point in read_metrics(tmp_path) if "valid/cross_entropy" in point]
    for point in evaluations:
        names = [name for name in point if name.startswith("valid/")]
        assert names == [f"valid/cross_entropy{name}" for name in ("", "/a/valid", "/b/valid")]
    (started,) = read_events(tmp_path)
    assert list(started["run"]["held_out"]) == ["a/valid", "b/valid"]
