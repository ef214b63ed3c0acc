"""Parquet files as inputs, against the same documents as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from spikingbrain_train.data.documents import find_sources
from spikingbrain_train.data.preprocess import preprocess
from spikingbrain_train.data.preprocess_options import PreprocessOptions
from spikingbrain_train.errors import DataError

ROWS = [
    {
        "text": f"text number {number}, naïve 脑",
        "meta": {"source": "web" if number % 2 else "code"},
        "size": number,
    }
    for number in range(3000)
]


def write(path: Path, rows: list[dict], **options: object) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


@pytest.mark.parametrize("changes", [{}, {"domain_key": "meta.source"}])
@pytest.mark.parametrize("compression", ["snappy", "zstd"])
def test_rows_are_the_documents_of_json_lines(
    tmp_path: Path, hf_folder: Path, changes: dict, compression: str
) -> None:
    write(tmp_path / "d.parquet", ROWS, row_group_size=500, compression=compression)
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for suffix in ("parquet", "jsonl"):
        inputs, prefix = [str(tmp_path / f"d.{suffix}")], str(tmp_path / suffix / "d")
        preprocess(PreprocessOptions(inputs, prefix, str(hf_folder), **changes))
    found, expected = (
        {path.name: path.read_bytes() for path in (tmp_path / suffix).iterdir()}
        for suffix in ("parquet", "jsonl")
    )
    assert found == expected and len(found["d.bin"]) > 100_000


def test_conversations_lie_in_columns_too(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hello"}], "tools": None}]
    (source,) = find_sources([str(write(tmp_path / "c.parquet", rows))])
    (document,) = source.read(fields=["messages", "*"])
    assert document.is_json and json.loads(document.payload) == rows[0]
    assert document.position == source.size


def test_bad_rows_and_files_are_named(tmp_path: Path) -> None:
    def documents(path: Path, *fields: str) -> list[str]:
        (source,) = find_sources([str(path)])
        return [document.text("text") for document in source.read(fields=fields or ("text",))]

    good = write(tmp_path / "good.parquet", ROWS[:3])
    assert documents(good) == [row["text"] for row in ROWS[:3]]
    with pytest.raises(
        DataError, match=r"has no column 'body' \(columns: meta, size, text\): name another with"
    ):
        documents(good, "body")
    with pytest.raises(DataError, match=r"null.parquet:2: the field 'text' is not a string"):
        documents(write(tmp_path / "null.parquet", [{"text": "a"}, {"text": None}]))
    with pytest.raises(DataError, match=r"number.parquet:1: the field 'text' is not a string"):
        documents(write(tmp_path / "number.parquet", [{"text": 1}]))
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(good.read_bytes()[:-20])
    with pytest.raises(DataError, match="cut.parquet is damaged or no Parquet file"):
        documents(cut)
    with pytest.raises(DataError, match="empty.parquet is empty"):
        documents(_empty(tmp_path))


def _empty(folder: Path) -> Path:
    path = folder / "empty.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    return path
