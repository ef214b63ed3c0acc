"""What a plan says of a run's data, from heads of files and without torch."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikingbrain_train.config.blend import blend
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.data_plan import DataPlan, plan_data
from spikingbrain_train.planning.plan_report.report import as_values, render
from tests.planning.runs import plan_of

SEQUENCE, BATCH = 64, 2


def write_dataset(prefix: Path, tokens: int, documents: int = 1) -> str:
    """Files as long as those of a dataset of uint16; lists are holes."""
    prefix.parent.mkdir(exist_ok=True)
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, documents, documents + 1)
    Path(f"{prefix}.idx").write_bytes(head)
    os.truncate(f"{prefix}.idx", len(head) + 12 * documents + 8 * (documents + 1))
    Path(f"{prefix}.bin").touch()
    os.truncate(f"{prefix}.bin", 2 * tokens)
    return str(prefix)


def planned(*overrides: str) -> DataPlan:
    return plan_data(_plan(*overrides).config)


def _plan(*overrides: str):
    return plan_of(
        f"model=tiny_hybrid cluster=cpu stage.seq_length={SEQUENCE} stage.global_batch_size={BATCH}",
        *overrides,
    )


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def _blend(*weighted: tuple[str | Path, float]) -> str:
    """data.train as a command line has it, here cut at its spaces."""
    entries = (f"{{prefix:{prefix},weight:{weight}}}" for prefix, weight in weighted)
    return f"data.train=[{','.join(entries)}]"


@pytest.fixture(scope="module")
def any_config() -> RunConfig:
    return _plan("stage.train_iters=1").config


def test_every_source_has_size_share_and_epochs(tmp_path: Path) -> None:
    first = write_dataset(tmp_path / "a", 64 * 30 + 1, documents=5)
    second = write_dataset(tmp_path / "b", 64 * 10 + 60)
    by_size = planned(f"data.train=[{first},{second}] stage.train_iters=40")
    assert [(source.size.documents, source.size.tokens) for source in by_size.train] == [(5, 1921), (1, 700)]
    assert [source.share for source in by_size.train] == [0.75, 0.25]
    assert [source.epochs for source in by_size.train] == [2.0, 2.0]
    weighted = planned(f"{_blend((first, 1), (second, 3))} stage.train_iters=40")
    assert [source.share for source in weighted.train] == [0.25, 0.75]
    assert [source.epochs for source in weighted.train] == pytest.approx([20 / 30, 6.0])


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.integers(SEQUENCE + 1, 5000), min_size=1, max_size=4),
    st.integers(1, 60),
    st.booleans(),
)
def test_epochs_are_those_that_the_run_reads(
    tmp_path_factory, any_config: RunConfig, tokens: list[int], steps: int, weighted: bool
) -> None:
    """Against the dataset that draws the samples: greedy blending is within a few samples of the shares."""
    from spikingbrain_train.data.gpt_dataset import ShuffledWindows, TrainDataset

    folder = tmp_path_factory.mktemp("data")
    prefixes = [write_dataset(folder / str(number), count) for number, count in enumerate(tokens)]
    weights = [number + 1 for number in range(len(tokens))] if weighted else None
    data = replace(any_config.data, train=blend(prefixes, weights))
    plan = plan_data(replace(any_config, data=data, stage=replace(any_config.stage, train_iters=steps)))

    class Tokens:
        def __init__(self, count: int) -> None:
            self.num_tokens, self.prefix = count, ""

    parts = [ShuffledWindows(Tokens(count), SEQUENCE, (0, 0)) for count in tokens]  # type: ignore[arg-type]
    drawn = TrainDataset(parts, weights, steps * BATCH).samples_per_part()
    for source, samples, part in zip(plan.train, drawn, parts, strict=True):
        assert abs(source.epochs * part.windows_per_epoch - samples) <= len(tokens)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (59, None),
        (61, "is read 4.1 times: up to about 4 epochs are nearly as good as fresh tokens"),
        (239, "later ones less and less"),
        (241, "is read 16.1 times: beyond about 16 epochs, repeated tokens add little (Muennighoff"),
        (25_500, "is read 1,700 times: .* or lower stage.train_iters (60 would read it 4 times)"),
    ],
)
def test_repetition_is_said_where_it_costs(tmp_path: Path, steps: int, words: str | None) -> None:
    prefix = write_dataset(tmp_path / "a", 64 * 30 + 1)
    said = planned(f"data.train=[{prefix}] stage.train_iters={steps}").warnings()
    assert len(said) == (words is not None)
    for part in (words or "").split(" .* "):
        assert part in "".join(said)


def test_the_worst_of_many_stands_for_them(tmp_path: Path) -> None:
    each = [(write_dataset(tmp_path / str(n), 64 * (n + 1) + 1), 1) for n in range(50)]
    (little, less) = planned(f"{_blend(*each)} stage.train_iters=2500").warnings()
    assert little.startswith(
        f"data.train[0]={tmp_path}/0 is read 100 times (5 more of data.train more than 16"
    )
    assert "lower its weight in data.train" in little
    assert less.startswith(
        f"data.train[6]={tmp_path}/6 is read 14.3 times (17 more of data.train more than 4"
    )


def test_missing_datasets_are_found_and_near_ones_named(tmp_path: Path) -> None:
    for name in ("wiki_train", "wiki_valid", "code", "books", "mails"):
        write_dataset(tmp_path / name, 1000)
    present = tmp_path / "code"
    plan = planned(
        f"data.train=[{present},{tmp_path}/wikitrain,{tmp_path}/away/wiki] data.valid=[{tmp_path}/zzz]"
        " stage.train_iters=1"
    )
    assert [source.share for source in plan.train] == [None] * 3
    near, nowhere, other = plan.warnings()[:3]
    assert near.startswith(
        f"data.train[1]={tmp_path}/wikitrain: there is no {tmp_path}/wikitrain.bin, but "
        f"{tmp_path}/wiki_train, {tmp_path}/wiki_valid"
    )
    assert f"data.train[2]={tmp_path}/away/wiki" in nowhere and f"nor a folder {tmp_path}/away" in nowhere
    assert f"but {tmp_path}/books, {tmp_path}/code, {tmp_path}/mails and 2 others" in other
    assert all(sentence.endswith("(the path without .bin and .idx)") for sentence in (near, nowhere, other))
    weighted = planned(f"{_blend((present, 1), (tmp_path / 'x', 4))} stage.train_iters=1")
    assert [source.share for source in weighted.train] == [0.2, 0.8]


def test_a_damaged_index_is_a_warning(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "a", 1000)
    Path(f"{prefix}.idx").write_bytes(b"no index")
    (said,) = planned(f"data.train=[{prefix}] stage.train_iters=1").warnings()
    assert said.startswith(f"{prefix}.idx is 8 bytes long")


def test_a_source_shorter_than_a_sequence_is_said(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "a", SEQUENCE)
    plan = planned(f"data.train=[{prefix}] stage.train_iters=1")
    assert plan.train[0].epochs is None
    (said,) = plan.warnings()
    assert "has 64 tokens, but one sample needs 65 (stage.seq_length + 1): a run will refuse it" in said


def test_held_out_data_against_what_evaluations_ask_for(tmp_path: Path) -> None:
    first, second = write_dataset(tmp_path / "a", 64 * 3 + 2), write_dataset(tmp_path / "b", 64 * 9 + 1)
    valid = f"data.valid=[{first},{second}] stage.train_iters=1"
    plan = planned(valid, "logging.eval_iters=4")
    assert [(source.windows, source.read) for source in plan.valid] == [(4, 4), (9, 4)]
    assert plan.warnings() == []
    (unread,) = planned(valid, "logging.eval_iters=2").warnings()
    assert f"data.valid[1]={second} is never read: logging.eval_iters=2 ends before it; 7 reads all" in unread
    (short,) = planned(valid, "logging.eval_iters=16").warnings()
    assert "data.valid holds 13 sequences of stage.seq_length=64" in short and "asks for 32" in short


def test_the_section_fits_its_columns_and_is_json(tmp_path: Path) -> None:
    deep = write_dataset(tmp_path / ("long_" * 20), 64 * 1000 + 1, documents=9)
    plan = _plan(f"data.train=[{deep},nowhere] data.valid=[{deep}] stage.train_iters=3")
    for width in (80, 100, 120):
        section = render(plan, width).partition("training data")[2].partition("parameters of the model")[0]
        lines = [line for line in section.splitlines() if str(tmp_path) not in line]
        assert max(map(len, lines)) <= width
        assert f"...{deep[-20:]}" in section
    values = as_values(plan)["data"]
    assert values["train"][0]["documents"] == 9 and values["train"][1]["tokens"] is None
    assert values["warnings"] == plan_data(plan.config).warnings()
    assert "data" not in as_values(_plan("stage.train_iters=3"))


def test_a_large_dataset_takes_no_time(tmp_path: Path) -> None:
    """A trillion tokens in half a billion documents: files with holes, of which only heads are read."""
    try:
        prefix = write_dataset(tmp_path / "a", 10**12, documents=5 * 10**8)
    except OSError:
        pytest.skip("the file system has no files of that size")
    (source,) = planned(f"data.train=[{prefix}] stage.train_iters=1").train
    assert source.size is not None and source.size.tokens == 10**12


def test_wrong_weights_are_refused_in_a_dry_run(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "a", 1000)
    with pytest.raises(ConfigurationError, match="has the weight -1, which must be"):
        planned(f"{_blend((prefix, -1))} stage.train_iters=1")
