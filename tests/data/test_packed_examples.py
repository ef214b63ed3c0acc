"""Whole examples packed into sequences, against what a reader makes of the examples one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spikingbrain_train.config.run import DataConfig, LoggingConfig, RunConfig
from spikingbrain_train.config.stage import LongExamples, StageConfig
from spikingbrain_train.data.packed_examples import PackedExamples, build_examples, open_valid_examples
from spikingbrain_train.errors import DataError
from spikingbrain_train.planning.data_plan import plan_data
from spikingbrain_train.planning.example_packing import fill, nothing_fits, pack
from spikingbrain_train.planning.file_checks import check_examples
from tests.data.test_loss_mask import write_examples

LENGTH = 48
TRUNCATE, DROP = LongExamples.truncate, LongExamples.drop


def make(folder: Path, count: int = 120, longest: int = 80, seed: int = 0) -> tuple[str, list, list]:
    """Examples whose tokens name the example; prefix, token ids and masks."""
    random = np.random.RandomState(seed)
    lengths = random.randint(2, longest, count)
    ids = [(1000 * (number + 1) + np.arange(length)).tolist() for number, length in enumerate(lengths)]
    loss = [[0, *random.randint(0, 2, length - 1)] for length in lengths]
    for number, each in enumerate(loss):
        if number % 5 == 0:  # an answer at the very end
            each[:] = [0] * len(each)
        each[-1 if number % 5 == 0 else random.randint(1, len(each))] = 1
    return write_examples(folder, ids, loss), ids, loss


def pieces(sample: dict, seq_length: int = LENGTH) -> list[tuple[list[int], list[int], list[float]]]:
    """Inputs, labels and loss of every document of a sample."""
    bounds = sample["cu_seqlens"].tolist()
    assert bounds[0] == 0 and bounds[-1] == seq_length
    parts = [
        tuple(sample[name][begin:end].tolist() for name in ("tokens", "labels", "loss_mask"))
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    return [part for part in parts if any(part[2])]


@pytest.mark.parametrize("long", list(LongExamples))
def test_every_epoch_has_every_example_once_and_whole(tmp_path: Path, long: LongExamples) -> None:
    prefix, ids, loss = make(tmp_path / "d")
    data = PackedExamples(prefix, LENGTH, long, seed=(7, 0))
    expected = []
    for example, mask in zip(ids, loss, strict=True):
        end = max(np.flatnonzero(mask))  # what comes behind the last loss teaches nothing
        if end > LENGTH:
            end = 0 if long is DROP else LENGTH
        if any(mask[1 : end + 1]):
            labels, kept = example[1 : end + 1], [float(each) for each in mask[1 : end + 1]]
            expected.append((example[:end], labels, kept))
    assert len(expected) < len(ids), "some are left out in either case"
    epochs = []
    for epoch in range(3):
        first = epoch * data.windows_per_epoch
        found = [pieces(data.sample(first + number)) for number in range(data.windows_per_epoch)]
        assert sorted(piece for each in found for piece in each) == sorted(expected)
        epochs.append(found)
    together = [{frozenset(piece[0][0] for piece in each) for each in found} for found in epochs]
    assert together[0] != together[1], "other examples share a sequence"
    assert data.fitting.read == len(expected)
    tokens = sum(len(inputs) for inputs, _, _ in expected)
    assert data.fill == pytest.approx(tokens / (data.windows_per_epoch * LENGTH))


def test_a_sequence_depends_on_seed_and_number_alone(tmp_path: Path) -> None:
    prefix, *_ = make(tmp_path / "d")
    data, again = (PackedExamples(prefix, LENGTH, TRUNCATE, seed=(7, 0)) for _ in range(2))
    numbers = range(2 * data.windows_per_epoch + 3)
    forward = [data.examples(number).tolist() for number in numbers]
    assert [again.examples(number).tolist() for number in reversed(numbers)] == forward[::-1]
    other = PackedExamples(prefix, LENGTH, TRUNCATE, seed=(8, 0))
    assert [other.examples(number).tolist() for number in numbers] != forward


@pytest.mark.parametrize(("count", "seq_length", "least"), [(20_000, 8192, 0.999), (300, 2048, 0.97)])
def test_little_is_left_empty(count: int, seq_length: int, least: float) -> None:
    random = np.random.RandomState(0)
    lengths = np.clip(random.lognormal(6, 1, count).astype(int), 1, seq_length).tolist()
    packing = pack(lengths, seq_length)
    used = np.zeros(packing.sequences, dtype=int)
    for length, sequences in packing.order:
        np.add.at(used, sequences, length)
    assert used.max() <= seq_length and used.sum() == sum(lengths) and used.min() > 0
    assert sum(len(sequences) for _, sequences in packing.order) == count
    assert fill(lengths, packing.sequences, seq_length) >= least


def test_held_out_examples_are_read_once_in_a_fixed_order(tmp_path: Path) -> None:
    first, _, loss = make(tmp_path / "a", longest=40)
    second, _, more = make(tmp_path / "b", 30, longest=40, seed=1)
    valid, again = (open_valid_examples([first, second], LENGTH) for _ in range(2))
    samples = [valid[number] for number in range(len(valid))]
    assert all((again[number]["tokens"] == each["tokens"]).all() for number, each in enumerate(samples))
    by_dataset = [sum(s["loss_mask"].sum() for s in samples if s["dataset"] == which) for which in (0, 1)]
    assert valid.predicted_tokens() == by_dataset == [sum(map(sum, loss)), sum(map(sum, more))]
    assert sum(open_valid_examples([first, second], LENGTH, 3).predicted_tokens()) == sum(
        sample["loss_mask"].sum() for sample in samples[:3]
    )
    alone = open_valid_examples([first, second], LENGTH, alone=True)
    assert len(alone) == 150 and alone.predicted_tokens() == valid.predicted_tokens()
    assert all(len(pieces(alone[number])) == 1 for number in range(150))


def test_plan_and_start_up_know_what_training_reads(tmp_path: Path) -> None:
    prefix, *_ = make(tmp_path / "a")
    small, *_ = make(tmp_path / "b", 20, seed=1)
    config = RunConfig(
        data=DataConfig(train=[prefix], valid=[small]),
        stage=StageConfig(kind="sft", train_iters=10, seq_length=LENGTH, global_batch_size=4),
        logging=LoggingConfig(eval_iters=2),
        output_dir=str(tmp_path / "run"),
    )
    plan = plan_data(config)
    train, _ = build_examples(config.data, LENGTH, 40)
    (source,), (part,) = plan.train, train.parts
    assert source.examples is not None
    assert source.examples.sequences == part.windows_per_epoch
    assert source.epochs == pytest.approx(40 / part.windows_per_epoch)
    assert plan.valid[0].windows == len(open_valid_examples([small], LENGTH))
    said = "\n".join(plan.warnings())
    assert "are cut off there (stage.sft.long_examples=truncate)" in said
    assert "are left out (stage.sft.long_examples=truncate)" in said
    check_examples(config)
    config.stage.seq_length, config.stage.sft.long_examples = 1, DROP
    for refuse in (check_examples, lambda config: build_examples(config.data, 1, 40, long=DROP)):
        with pytest.raises(DataError, match="none of the examples of .* fits into stage.seq_length=1"):
            refuse(config)
    assert str(nothing_fits(small, 1, TRUNCATE)).endswith("loss in its first stage.seq_length=1: raise it")
    Path(f"{small}.loss_mask").unlink()
    config.stage.seq_length = LENGTH
    for refuse in (check_examples, lambda config: build_examples(config.data, LENGTH, 40)):
        with pytest.raises(DataError, match="--chat-key messages --loss-on assistant"):
            refuse(config)
    config.stage.kind = "cpt"
    assert "has a loss mask, which stage.kind=cpt does not read" in "\n".join(plan_data(config).warnings())
