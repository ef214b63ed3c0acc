from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from spikingbrain_train.data.length_picture import draw_lengths
from spikingbrain_train.data.lengths import (
    counted,
    describe_dataset,
    length_bins,
    summarize,
    text_histogram,
)
from spikingbrain_train.errors import DataError
from tests.data.preprocess_command import exit_code_of

LENGTHS = st_numpy.arrays(np.int32, st.integers(1, 60), elements=st.integers(1, 100_000))


@settings(deadline=None)
@given(LENGTHS)
def test_the_summary_is_that_of_sorted_lengths(lengths: np.ndarray) -> None:
    found, ordered = summarize(lengths), sorted(lengths.tolist())
    assert (found.documents, found.tokens) == (len(ordered), sum(ordered))
    assert (found.min, found.max) == (ordered[0], ordered[-1])
    assert found.mean == sum(ordered) / len(ordered)
    assert found.median == ordered[-(-len(ordered) // 2) - 1]
    assert found.p99 == ordered[-(-99 * len(ordered) // 100) - 1]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 20))
def test_every_document_is_in_one_bin(lengths: np.ndarray, most: int) -> None:
    bounds = length_bins(int(lengths.max()), most)
    documents, tokens = counted(lengths, bounds)
    assert len(bounds) - 1 <= most and (np.diff(bounds) > 0).all()
    assert (documents.sum(), tokens.sum()) == (len(lengths), lengths.sum(dtype=np.int64))


def test_documents_of_several_sequences_are_counted_whole(tmp_path: Path) -> None:
    """As Megatron-LM writes them with --split-sentences, an empty document among them."""
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    builder.add_document(np.arange(9), [2, 3, 4])
    builder.end_document()
    builder.add_document(np.arange(5), [5])
    builder.finalize(str(tmp_path / "m.idx"))
    found = describe_dataset(tmp_path / "m")
    assert found.lengths.tolist() == [9, 0, 5]
    assert (found.summary.documents, found.summary.tokens, found.summary.min) == (3, 14, 0)
    assert (found.bytes_per_token, found.tokenizer) == (None, None)
    said = text_histogram([found])[2:]
    assert [line.split()[-5:-3] for line in said] == [["1", "35.7%"], ["1", "64.3%"]]
    draw_lengths([found])


def test_damaged_files_are_refused(write_tokens) -> None:
    prefix = write_tokens("d", [[1, 2, 0], [3, 0]])
    index = Path(prefix + ".idx")
    content = index.read_bytes()
    for damaged in (
        content[:-1],
        content[:10],
        content[:34] + struct.pack("<i", -3) + content[38:],
        content[:34] + struct.pack("<i", 9) + content[38:],
        content[:-24] + struct.pack("<qqq", 1, 1, 2),
    ):
        index.write_bytes(damaged)
        with pytest.raises(DataError):
            describe_dataset(prefix)
    index.unlink()
    with pytest.raises(DataError, match=r"there is no indexed dataset at .*d \("):
        describe_dataset(prefix)


def test_datasets_are_described_as_text_json_and_picture(
    write_tokens, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_tokens("a", [[1] * 3, [2] * 40, [3] * 900])
    second = write_tokens("b", [[1] * 5])
    assert exit_code_of(["--describe", first, second]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == [
        "dataset",
        "documents",
        "tokens",
        "min",
        "median",
        "mean",
        "p99",
        "max",
        "bytes/token",
    ]
    assert said[2].split()[1:] == ["3", "943", "3", "40", "314.3", "900", "900", "0.00"]
    assert any(line.strip().startswith("512 - 1,023") and "95.4%" in line for line in said)
    for name in ("lengths.png", "deep/lengths.svg"):
        assert exit_code_of(["--describe", first, second, "--json", "--plot", str(tmp_path / name)]) == 0
        values = json.loads(capsys.readouterr().out)["datasets"]
        assert [each["tokens"] for each in values] == [943, 5]
        assert values[0]["p99"] == 900 and values[0]["dtype"] == "int32"
        assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize("lengths", [[1], [7, 7], [1, 2, 3], [3, 5_000_000], list(range(1, 400))])
def test_pictures_show_every_document_and_mark_median_and_p99(write_tokens, lengths: list[int]) -> None:
    described = describe_dataset(write_tokens("d", [[1] * min(length, 9) for length in lengths]))
    described = type(described)("d", np.array(lengths), summarize(np.array(lengths)), "int32", None, None)
    (axis,) = draw_lengths([described]).axes
    assert sum(bar.get_height() for bar in axis.patches[: len(axis.containers[0])]) == pytest.approx(1)
    assert [text.get_text() for text in axis.texts] == [
        f"median {described.summary.median:,}",
        f"p99 {described.summary.p99:,}",
    ]
    assert (axis.get_xscale() == "log") == (max(lengths) > 20 * min(lengths))
    assert axis.get_ylabel() and axis.get_xlabel()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--plot", "lengths.gif"], "--plot lengths.gif ends in none of .png, .svg, .pdf"),
        (["--input", "x"], "--describe reads datasets that exist and --input is for writing one"),
        (["nowhere"], "there is no indexed dataset at nowhere"),
    ],
)
def test_a_wrong_request_is_one_sentence(write_tokens, capsys, arguments: list[str], sentence: str) -> None:
    assert exit_code_of(["--describe", write_tokens("d", [[1]]), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and sentence in printed.err and printed.err.count("\n") == 1


def test_a_run_draws_and_prints_json(
    tmp_path: Path, hf_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "one two three"}\n{"text": "four"}\n')
    arguments = ["--input", str(tmp_path / "in.jsonl"), "--tokenizer", str(hf_folder), "--workers", "1"]
    arguments += ["--output-prefix", str(tmp_path / "out/d"), "--plot", str(tmp_path / "l.png"), "--json"]
    assert exit_code_of(arguments) == 0
    values = json.loads(capsys.readouterr().out)
    (dataset,) = values["datasets"]
    assert (dataset["documents"], values["documents_dropped"], values["warnings"]) == (2, 0, [])
    assert dataset["tokens"] == describe_dataset(tmp_path / "out/d").summary.tokens
    assert dataset["tokens"] / values["seconds"] == pytest.approx(values["tokens_per_second"])
    assert (tmp_path / "l.png").is_file()
    assert exit_code_of([*arguments, "--dry-run", "--overwrite"]) == 2
    assert "--dry-run writes nothing" in capsys.readouterr().err
