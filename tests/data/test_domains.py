"""Domains of documents are stored beside their tokens, wherever they are said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spikingbrain_train.data import domains as module
from spikingbrain_train.data.domains import read_domains
from spikingbrain_train.data.indexed import TokenFile, read_info
from spikingbrain_train.data.preprocess import preprocess
from spikingbrain_train.data.preprocess_options import PreprocessOptions
from spikingbrain_train.errors import ConfigurationError, DataError
from tests.data.conftest import WriteTokens

RECORDS = [
    {
        "text": f"text number {n} {'and more ' * n}",
        "source": ["wiki", "code"][n % 2],
        "meta": {"year": n // 4},
    }
    for n in range(12)
]


@pytest.fixture
def options(tmp_path: Path, hf_folder: Path) -> PreprocessOptions:
    for name, records in (("a/x.jsonl", RECORDS[:8]), ("b/y.jsonl", RECORDS[8:])):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return PreprocessOptions([str(tmp_path / "in")], str(tmp_path / "out" / "d"), str(hf_folder))


def stored(prefix: str) -> list[str]:
    info = read_info(prefix)
    assert info is not None
    found = read_domains(prefix, info.documents)
    assert found is not None and found.names == info.domains
    return [found.names[number] for number in found.of_document]


def test_they_come_from_a_field_a_file_or_a_folder(options: PreprocessOptions) -> None:
    folder = Path(options.inputs[0])
    expected = {
        "source": ({"domain_key": "source"}, [record["source"] for record in RECORDS]),
        "meta.year": ({"domain_key": "meta.year"}, [str(n // 4) for n in range(12)]),
        "file": ({"domain_from": "file"}, [f"{folder}/a/x.jsonl"] * 8 + [f"{folder}/b/y.jsonl"] * 4),
        "folder": ({"domain_from": "folder"}, [f"{folder}/a"] * 8 + [f"{folder}/b"] * 4),
    }
    for changes, domains in expected.values():
        preprocess(replace(options, overwrite=True, **changes))  # type: ignore[arg-type]
        assert stored(options.output_prefix) == domains
    preprocess(replace(options, overwrite=True))
    assert not Path(f"{options.output_prefix}.domains.npy").exists()  # nothing of the older dataset is left
    info = read_info(options.output_prefix)
    assert info is not None and info.domains is None


@pytest.mark.parametrize("split", [{"valid_fraction": 0.4}, {"valid_tokens": 60}], ids=str)
def test_they_follow_their_documents_into_a_split(
    options: PreprocessOptions, split: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spikingbrain_train.data.tokenize_documents._CHUNK_DOCUMENTS", 2)
    preprocess(replace(options, domain_key="source", **split))
    for side in ("train", "valid"):
        prefix = f"{options.output_prefix}_{side}"
        dataset, domains = TokenFile(prefix), stored(prefix)
        assert 0 < len(domains) < len(RECORDS)
        eos = read_info(prefix).eos_id  # type: ignore[union-attr]
        ends = np.flatnonzero(dataset.read(0, dataset.num_tokens) == eos) + 1
        numbers = np.diff(ends, prepend=0)
        # The texts grow with their number, so that a length tells which of them it is.
        lengths = _lengths(options)
        assert domains == [RECORDS[lengths.index(int(length))]["source"] for length in numbers]


def _lengths(options: PreprocessOptions) -> list[int]:
    whole = replace(options, output_prefix=options.output_prefix + "_whole", overwrite=True)
    preprocess(whole)
    dataset, info = TokenFile(whole.output_prefix), read_info(whole.output_prefix)
    assert info is not None
    ends = np.flatnonzero(dataset.read(0, dataset.num_tokens) == info.eos_id) + 1
    lengths = np.diff(ends, prepend=0).tolist()
    assert len(set(lengths)) == len(lengths)
    return lengths


def test_text_files_need_another_place_to_take_theirs_from(options: PreprocessOptions) -> None:
    text = Path(options.inputs[0]) / "notes.txt"
    text.write_text("no fields here")
    with pytest.raises(DataError, match=r"notes.txt: it has no field source .* add --domain-from folder"):
        preprocess(replace(options, domain_key="source"))
    preprocess(replace(options, domain_key="source", domain_from="file"))
    assert stored(options.output_prefix)[-1] == str(text)


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"text": "a"}, r"bad.jsonl:1: no field 'source' \(fields: text\)"),
        ({"text": "a", "source": ["x"]}, "bad.jsonl:1: the field 'source' names no domain"),
        ({"text": "a", "source": " "}, "bad.jsonl:1: the field 'source' names no domain"),
    ],
)
def test_a_document_without_one_is_named(options: PreprocessOptions, record: dict, sentence: str) -> None:
    bad = Path(options.inputs[0]) / "bad.jsonl"
    bad.write_text(json.dumps(record) + "\n")
    with pytest.raises(DataError, match=sentence):
        preprocess(replace(options, domain_key="source"))
    report = preprocess(replace(options, domain_key="source", skip_bad_documents=True))
    assert len(report.skipped) == 1 and len(stored(options.output_prefix)) == len(RECORDS)


def test_their_number_is_bounded(options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_DOMAINS", 1)
    with pytest.raises(DataError, match="more than 1 domains: name a field of fewer values"):
        preprocess(replace(options, domain_key="source"))
    with pytest.raises(ConfigurationError, match="--domain-from is shelf: give file or folder"):
        replace(options, domain_from="shelf")


def test_damaged_ones_are_refused(write_tokens: WriteTokens) -> None:
    prefix = write_tokens("d", [[1, 2], [3]], domains=["x", "y"])
    assert read_domains(prefix, 2) is not None
    with pytest.raises(DataError, match="it has 2 domains for 3 documents"):
        read_domains(prefix, 3)
    np.save(f"{prefix}.domains.npy", np.array([0, 7], dtype=np.uint16))
    with pytest.raises(DataError, match="counts more domains than the 2 of"):
        read_domains(prefix, 2)
    Path(f"{prefix}.domains.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match="does not say the domains of"):
        read_domains(prefix, 2)
