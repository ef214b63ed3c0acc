from __future__ import annotations

import logging
import math
import os
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from spikingbrain_train.config.blend import blend
from spikingbrain_train.config.run import DataConfig
from spikingbrain_train.config.run_record import blend_shares
from spikingbrain_train.data.gpt_dataset import TrainDataset, ValidDataset, build_datasets
from spikingbrain_train.data.indexed import open_indexed_dataset
from spikingbrain_train.data.loader import WholeBatch, build_data_loader, local_micro_batch
from spikingbrain_train.errors import ConfigurationError, DataError

SEQ = 8
PINNED_ORDER = [34, 114, 2, 186, 82, 178, 138, 154]
"""First tokens of the first samples of `counted` with seed 1234."""
FILES = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def counted(write_tokens) -> str:
    """A dataset whose token at position i is i, in uneven documents: 203 tokens, 25 windows of 8."""
    bounds = [0, 3, 50, 51, 120, 203]
    return write_tokens("counted", [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)])


@pytest.fixture
def four(write_tokens) -> list[str]:
    """Four datasets; the tokens of number n start at 1000 n."""
    return [write_tokens(f"d{n}", [range(1000 * n, 1000 * n + 100 + 7 * n)]) for n in range(4)]


def train_dataset(prefix: str | list[str], samples: int, **changes: object) -> TrainDataset:
    prefixes = [prefix] if isinstance(prefix, str) else prefix
    weights = changes.pop("weights", None)
    data = DataConfig(train=blend(prefixes, weights))  # type: ignore[arg-type]
    return build_datasets(data, SEQ, samples, **changes)[0]  # type: ignore[arg-type]


def batches(dataset: TrainDataset | ValidDataset, **changes: object) -> list[WholeBatch]:
    arguments: dict = {
        "consumed_samples": 0,
        "micro_batch_size": 1,
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
    }
    return list(build_data_loader(dataset, **{**arguments, **changes}))


def assert_same(expected: WholeBatch, found: WholeBatch) -> None:
    assert expected.keys() == found.keys()
    assert expected["cu_seqlens"] == found["cu_seqlens"]
    for name in ("tokens", "labels", "loss_mask"):
        assert torch.equal(expected[name], found[name])  # type: ignore[literal-required]


def firsts(dataset: TrainDataset | ValidDataset) -> list[int]:
    """First token of every sample, which in `counted` is its position."""
    return [int(dataset[index]["tokens"][0]) for index in range(len(dataset))]


def test_a_sample_is_a_window_with_its_next_tokens(counted: str) -> None:
    sample = train_dataset(counted, 1)[0]
    start = int(sample["tokens"][0])
    assert sample["tokens"].tolist() == list(range(start, start + SEQ))
    assert sample["labels"].tolist() == list(range(start + 1, start + SEQ + 1))
    assert sample["loss_mask"].tolist() == [1.0] * SEQ
    dtypes = {name: tensor.dtype for name, tensor in sample.items()}
    assert dtypes == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
    }


def test_every_epoch_takes_every_window_once_in_an_order_of_its_own(counted: str) -> None:
    order = firsts(train_dataset(counted, 75))
    epochs = [order[0:25], order[25:50], order[50:75]]
    for epoch in epochs:
        first = min(epoch)
        assert 0 <= first <= 2  # 203 tokens are 25 windows, one more label and 2 left over
        assert sorted(epoch) == list(range(first, first + 25 * SEQ, SEQ))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_depends_on_the_seed_alone(counted: str) -> None:
    assert firsts(train_dataset(counted, 60, seed=1)) == firsts(train_dataset(counted, 60, seed=1))
    assert firsts(train_dataset(counted, 60, seed=1)) != firsts(train_dataset(counted, 60, seed=2))


def test_the_order_is_the_one_of_earlier_releases(counted: str) -> None:
    # A checkpoint stores consumed_samples only: were this to change, resumed runs would see other data.
    assert firsts(train_dataset(counted, 8, seed=1234)) == PINNED_ORDER


def test_a_longer_run_starts_with_the_samples_of_a_shorter_one(counted: str, write_tokens) -> None:
    other = write_tokens("other", [range(1000, 1100)])
    for prefixes in ([counted], [counted, other]):
        assert firsts(train_dataset(prefixes, 100))[:40] == firsts(train_dataset(prefixes, 40))


@FILES
@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 3))
def test_every_data_parallel_size_sees_the_same_global_batches(
    counted: str, ranks: int, micro: int, consumed_steps: int
) -> None:
    assume(12 % (ranks * micro) == 0)
    dataset = train_dataset(counted, 60)
    consumed = 12 * consumed_steps
    per_rank = [
        batches(
            dataset,
            consumed_samples=consumed,
            micro_batch_size=micro,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            global_batch_size=12,
        )
        for rank in range(ranks)
    ]
    together = torch.cat([batch["tokens"] for step in zip(*per_rank, strict=True) for batch in step])
    alone = torch.stack([dataset[index]["tokens"] for index in range(consumed, 60)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_mid_epoch_repeats_the_uninterrupted_run(counted: str, num_workers: int) -> None:
    whole = batches(train_dataset(counted, 60), micro_batch_size=2)
    resumed = batches(
        train_dataset(counted, 60), micro_batch_size=2, consumed_samples=34, num_workers=num_workers
    )
    assert len(resumed) == 13
    for expected, found in zip(whole[17:], resumed, strict=True):
        assert_same(expected, found)


def test_documents_can_be_kept_apart(counted: str) -> None:
    """Tokens of `counted` are their positions, and its documents start at 0, 3, 50, 51 and 120."""
    data = DataConfig(train=[counted], valid=[counted], reset_at_documents=True)
    train, valid = build_datasets(data, SEQ, 25)
    assert valid is not None
    for dataset in (train, valid):
        for index in range(25):
            sample = dataset[index]
            first = int(sample["tokens"][0])
            starts = [start - first for start in (3, 50, 51, 120) if first < start < first + SEQ]
            assert sample["cu_seqlens"].tolist() == [0, *starts, SEQ]
            crosses = [float(label not in (3, 50, 51, 120)) for label in sample["labels"].tolist()]
            assert sample["loss_mask"].tolist() == crosses
    last = valid[25]  # tokens 200, 201 and their labels, then padding
    assert last["cu_seqlens"].tolist() == [0, SEQ]
    assert last["loss_mask"].tolist() == [1.0, 1.0] + [0.0] * 6


@pytest.mark.parametrize("num_workers", [0, 2])
def test_document_bounds_travel_with_their_batch(counted: str, num_workers: int) -> None:
    data = DataConfig(train=[counted], reset_at_documents=True)
    dataset, _ = build_datasets(data, SEQ, 24)
    for step, batch in enumerate(batches(dataset, micro_batch_size=3, num_workers=num_workers)):
        expected = [tuple(dataset[3 * step + row]["cu_seqlens"].tolist()) for row in range(3)]
        assert batch["cu_seqlens"] == tuple(expected)


@pytest.mark.parametrize("num_sink_tokens", [0, 1])
def test_context_parallel_slices_make_up_the_whole_text(counted: str, num_sink_tokens: int) -> None:
    data = DataConfig(train=[counted], reset_at_documents=True)
    dataset, _ = build_datasets(data, 11 - num_sink_tokens + 4, 4)
    (whole, *_) = batches(dataset, micro_batch_size=2)
    slices = [
        local_micro_batch(
            whole,
            torch.device("cpu"),
            num_sink_tokens=num_sink_tokens,
            context_parallel_rank=rank,
            context_parallel_size=3,
        )
        for rank in range(3)
    ]
    for name in ("tokens", "labels", "loss_mask"):
        together = torch.cat([getattr(part, name) for part in slices], dim=1)
        assert torch.equal(together, whole[name])  # type: ignore[literal-required]
    assert [part.tokens.shape[1] for part in slices] == [5 - num_sink_tokens, 5, 5]
    assert all(part.layout.cu_seqlens == whole["cu_seqlens"] for part in slices)


def test_a_loader_leaves_the_global_random_state_alone(counted: str) -> None:
    before = torch.get_rng_state()
    batches(train_dataset(counted, 4))
    assert torch.equal(torch.get_rng_state(), before)


@FILES
@given(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=4))
def test_blending_follows_the_weights_at_every_point(four: list[str], weights: list[float]) -> None:
    dataset = train_dataset(four[: len(weights)], 300, weights=weights)
    source = np.array(firsts(dataset)) // 1000
    shares = np.asarray(weights) / np.sum(weights)
    for count in range(1, 301):
        seen = np.bincount(source[:count], minlength=len(weights))
        # Serving whoever lags most keeps n datasets within n - 1 samples of their shares.
        assert np.abs(seen - shares * count).max() <= len(weights) - 1 + 1e-6
    assert dataset.samples_per_part() == np.bincount(source, minlength=len(weights)).tolist()


def test_without_weights_datasets_are_blended_by_their_size(write_tokens) -> None:
    small = write_tokens("small", [range(0, 81)])  # 10 windows
    large = write_tokens("large", [range(1000, 1241)])  # 30 windows
    order = firsts(train_dataset([small, large], 40))
    assert sorted(order) == [*range(0, 80, SEQ), *range(1000, 1240, SEQ)]  # one epoch of each


@pytest.mark.parametrize("weights", [None, [0.1, 0.2, 0.7, 1 / 3], [3, 1e-9, 7e11, 0.3]])
def test_a_resumed_run_compares_the_shares_that_are_blended(four: list[str], weights: list | None) -> None:
    """To the last bit, as every release has blended them: the order of the samples depends on it."""
    dataset = train_dataset(four, 4, weights=weights)
    sizes = [part.num_tokens for part in dataset.parts]
    raw = weights or [float(part.windows_per_epoch) for part in dataset.parts]
    expected = np.asarray(raw, dtype=np.float64) / math.fsum(raw)
    assert dataset.weights.tobytes() == expected.tobytes()
    assert blend_shares(weights, sizes, SEQ) == expected.tolist()


def test_held_out_tokens_are_labels_exactly_once_and_in_order(write_tokens) -> None:
    prefixes = [write_tokens("a", [range(0, 30), range(30, 50)]), write_tokens("b", [range(100, 117)])]
    train = write_tokens("t", [range(9)])
    valid = build_datasets(DataConfig(train=[train], valid=prefixes), SEQ, 1)[1]
    assert valid is not None
    assert len(valid) == 7 + 2  # 49 labels, 16 labels
    labels, inputs = [], []
    for index in range(len(valid)):
        counted_ = valid[index]["loss_mask"].bool()
        labels += valid[index]["labels"][counted_].tolist()
        inputs += valid[index]["tokens"][counted_].tolist()
    assert labels == [*range(1, 50), *range(101, 117)]
    assert inputs == [*range(0, 49), *range(100, 116)]


def test_held_out_windows_can_be_limited(counted: str) -> None:
    valid = build_datasets(DataConfig(train=[counted], valid=[counted]), SEQ, 1, valid_samples=3)[1]
    assert valid is not None
    assert firsts(valid) == [0, 8, 16]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (2, 2), (4, 1), (4, 2)])
def test_evaluation_counts_every_token_once_for_every_data_parallel_size(
    counted: str, ranks: int, micro: int
) -> None:
    valid = ValidDataset([open_indexed_dataset(counted)], SEQ, None)
    per_rank = [
        batches(
            valid,
            micro_batch_size=micro,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            global_batch_size=8,
        )
        for rank in range(ranks)
    ]
    assert {len(rank_batches) for rank_batches in per_rank} == {32 // (ranks * micro)}
    seen = [batch["labels"][batch["loss_mask"] > 0] for step in zip(*per_rank, strict=True) for batch in step]
    assert torch.cat(seen).tolist() == list(range(1, 203))


@pytest.mark.parametrize("reset_at_documents", [False, True])
@pytest.mark.parametrize("windows", [1, 3, 26, 27, 30, None])
def test_the_tokens_of_an_evaluation_are_known_without_reading_them(
    counted: str, write_tokens, windows: int | None, reset_at_documents: bool
) -> None:
    other = write_tokens("other", [range(5), range(5, 6), range(6, 29)])
    datasets = [open_indexed_dataset(prefix) for prefix in (counted, other)]
    valid = ValidDataset(datasets, SEQ, windows, reset_at_documents=reset_at_documents)
    predicted = [0.0, 0.0]
    for index in range(len(valid)):  # 203 tokens are 26 windows
        predicted[index >= 26] += valid[index]["loss_mask"].sum().item()
    assert valid.predicted_tokens() == predicted


def test_without_held_out_prefixes_there_is_no_validation(counted: str) -> None:
    assert build_datasets(DataConfig(train=[counted]), SEQ, 1)[1] is None


def test_a_dataset_shorter_than_a_sample_is_refused(write_tokens) -> None:
    train_dataset(write_tokens("enough", [range(9)]), 3)
    with pytest.raises(DataError, match=r"short has 8 tokens but one sample needs 9 .* to at most 7"):
        train_dataset(write_tokens("short", [range(8)]), 3)


def test_a_short_held_out_dataset_is_padded_but_one_token_is_refused(counted: str, write_tokens) -> None:
    data = DataConfig(train=[counted], valid=[write_tokens("two", [[5, 6]])])
    valid = build_datasets(data, SEQ, 1)[1]
    assert valid is not None
    assert valid[0]["loss_mask"].tolist() == [1.0] + [0.0] * 7
    with pytest.raises(DataError, match="one has 1 token"):
        build_datasets(DataConfig(train=[counted], valid=[write_tokens("one", [[5]])]), SEQ, 1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (DataConfig(), "data.train is empty"),
        (DataConfig(train=["a", {"prefix": "b", "weight": 1.0}]), "b a weight and a none"),
        (DataConfig(train=blend(["a", "b"], [1.0, 0.0])), "must be a positive"),
        (DataConfig(train=blend(["a"], [float("nan")])), "must be a positive"),
    ],
)
def test_weights_that_do_not_fit_are_refused(data: DataConfig, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        build_datasets(data, SEQ, 1)


def test_damage_and_foreign_vocabularies_are_found_at_once(counted: str, hf_tokenizer) -> None:
    with pytest.raises(DataError, match="no indexed dataset at /absent"):
        train_dataset("/absent", 1)
    with pytest.raises(DataError, match="the model's vocabulary has only 200"):
        train_dataset(counted, 1, vocab_size=200)
    with pytest.raises(DataError, match="which is not the run's tokenizer"):
        train_dataset(counted, 1, tokenizer=hf_tokenizer)


def test_batch_sizes_that_do_not_divide_are_refused(counted: str) -> None:
    with pytest.raises(ConfigurationError, match="stage.global_batch_size 6 .* give a multiple of 4"):
        batches(train_dataset(counted, 6), micro_batch_size=2, data_parallel_size=2, global_batch_size=6)


def test_the_log_says_how_many_epochs_a_dataset_is_read(
    counted: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="spikingbrain_train"):
        train_dataset(counted, 50)
    assert "203 tokens, 50 samples, 2.00 epochs" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_that_is_cut_short_while_it_is_read_is_named(counted: str, num_workers: int) -> None:
    dataset = train_dataset(counted, 64)
    loader = build_data_loader(
        dataset,
        consumed_samples=0,
        micro_batch_size=1,
        data_parallel_rank=0,
        data_parallel_size=1,
        num_workers=num_workers,
    )
    if num_workers == 0:
        dataset[0]  # the file is open
    os.truncate(f"{counted}.bin", 0)
    with pytest.raises(DataError) as caught:
        list(loader)
    assert re.fullmatch(r"\S+counted\.bin (ends at byte|is 0 bytes long).*[^.]", str(caught.value))


def test_a_file_that_is_replaced_while_it_is_read_keeps_its_tokens(counted: str, write_tokens) -> None:
    dataset = train_dataset(counted, 2)
    first = dataset[0]["tokens"].tolist()
    os.replace(f"{write_tokens('other', [range(7, 9)])}.bin", f"{counted}.bin")
    assert dataset[0]["tokens"].tolist() == first
