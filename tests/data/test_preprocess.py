from __future__ import annotations

import json
import random
import resource
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from spikingbrain_train.data.indexed import read_info, token_dtype
from spikingbrain_train.data.preprocess import plan_preprocessing, preprocess
from spikingbrain_train.data.preprocess_options import PreprocessOptions
from spikingbrain_train.errors import ConfigurationError, DataError
from tests.data.preprocess_command import exit_code_of

TEXTS = [topics[key] for key in sorted(topics)[:40]]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "input" / "corpus.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def options(corpus: Path, tokenizer: Path, **changes: object) -> PreprocessOptions:
    base = PreprocessOptions([str(corpus)], str(corpus.parents[1] / "out" / "data"), str(tokenizer))
    return replace(base, **changes)  # type: ignore[arg-type]


def documents(prefix: str | Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))  # one sequence a document
    return [dataset[index].tolist() for index in range(len(dataset))]


def folder_content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def test_stored_tokens_are_those_of_transformers_and_eos(corpus: Path, hf_folder: Path) -> None:
    preprocess(options(corpus, hf_folder))
    reference = AutoTokenizer.from_pretrained(str(hf_folder))
    expected = [
        reference(text, add_special_tokens=False)["input_ids"] + [reference.eos_token_id] for text in TEXTS
    ]
    assert documents(corpus.parents[1] / "out" / "data") == expected


def test_stored_tokens_are_those_of_sentencepiece_and_eos(corpus: Path, spm_file: Path) -> None:
    preprocess(options(corpus, spm_file))
    reference = SentencePieceProcessor(model_file=str(spm_file))
    assert documents(corpus.parents[1] / "out" / "data") == [
        [*reference.encode(text), reference.eos_id()] for text in TEXTS
    ]


def test_the_sidecar_describes_the_dataset(corpus: Path, hf_folder: Path) -> None:
    report = preprocess(options(corpus, hf_folder))
    prefix = corpus.parents[1] / "out" / "data"
    info = read_info(prefix)
    assert info is not None and info == report.datasets[str(prefix)]
    stored = documents(prefix)
    assert (info.documents, info.tokens) == (len(TEXTS), sum(map(len, stored)))
    assert info.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert (info.dtype, info.vocab_size) == ("uint16", 400)
    assert (prefix.with_suffix(".bin")).stat().st_size == 2 * info.tokens


def test_large_vocabularies_are_stored_in_32_bits() -> None:
    assert token_dtype(65_499) is np.uint16
    assert token_dtype(152_064) is np.int32


@pytest.mark.parametrize("split", [{"valid_fraction": 0.3}, {"valid_tokens": 9000}], ids=str)
def test_the_number_of_workers_does_not_change_a_byte(
    corpus: Path, hf_folder: Path, spm_file: Path, monkeypatch: pytest.MonkeyPatch, split: dict
) -> None:
    # Many small chunks, so that workers finish out of order.
    monkeypatch.setattr("spikingbrain_train.data.tokenize_documents._CHUNK_DOCUMENTS", 1)
    for tokenizer in (hf_folder, spm_file):
        outputs = []
        for workers in (1, 3):
            folder = corpus.parents[1] / f"{tokenizer.name}_{workers}"
            preprocess(options(corpus, tokenizer, output_prefix=f"{folder}/d", workers=workers, **split))
            outputs.append(folder_content(folder))
        assert len(outputs[0]) == 6
        assert outputs[0] == outputs[1]


def test_held_out_documents_depend_on_content_alone(corpus: Path, hf_folder: Path) -> None:
    out = corpus.parents[1] / "out"
    preprocess(options(corpus, hf_folder, valid_fraction=0.3))
    train, valid = documents(out / "data_train"), documents(out / "data_valid")
    assert 0 < len(valid) < len(train)
    assert len(train) + len(valid) == len(TEXTS)

    # Shuffled and with copies: the same documents are held out, and all copies of them.
    twice = TEXTS * 2
    random.Random(0).shuffle(twice)
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in twice))
    preprocess(options(corpus, hf_folder, valid_fraction=0.3, overwrite=True))
    assert sorted(documents(out / "data_valid")) == sorted(valid * 2)
    assert sorted(documents(out / "data_train")) == sorted(train * 2)


def test_a_split_with_an_empty_side_is_refused(tmp_path: Path, hf_folder: Path) -> None:
    (tmp_path / "one.txt").write_text("a single document")
    prefix = tmp_path / "out" / "one"
    with pytest.raises(DataError, match=r"all 1 documents fell on one side .*one_valid would be empty"):
        preprocess(
            PreprocessOptions([str(tmp_path / "one.txt")], str(prefix), str(hf_folder), valid_fraction=0.05)
        )
    assert folder_content(prefix.parent) == {}


def test_an_existing_dataset_is_kept_unless_told_otherwise(corpus: Path, hf_folder: Path) -> None:
    out = corpus.parents[1] / "out"
    preprocess(options(corpus, hf_folder))
    before = folder_content(out)
    corpus.write_text('{"text": "something else"}\n')
    with pytest.raises(DataError, match=r"data.bin exists already: .* --overwrite"):
        preprocess(options(corpus, hf_folder))
    assert folder_content(out) == before
    preprocess(options(corpus, hf_folder, overwrite=True))
    assert len(documents(out / "data")) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_stops_everything_and_leaves_what_was_there(
    corpus: Path, hf_folder: Path, workers: int
) -> None:
    out = corpus.parents[1] / "out"
    preprocess(options(corpus, hf_folder))
    before = folder_content(out)
    with corpus.open("a") as file:
        file.write('{"text": "cut\n')
    with pytest.raises(DataError, match=f"^{corpus}:41: not a JSON object"):
        preprocess(options(corpus, hf_folder, overwrite=True, workers=workers))
    assert folder_content(out) == before


def test_bad_documents_can_be_skipped_and_are_counted(corpus: Path, hf_folder: Path) -> None:
    clean = options(corpus, hf_folder, output_prefix=str(corpus.parents[1] / "clean" / "data"))
    preprocess(clean)
    lines = corpus.read_text().splitlines()
    lines[3:3] = ["", '{"text": ""}', "{"]
    corpus.write_text("\n".join(lines) + "\n")
    report = preprocess(options(corpus, hf_folder, skip_bad_documents=True))
    assert [message.split(": ")[0] for message in report.skipped] == [f"{corpus}:{n}" for n in (4, 5, 6)]
    assert folder_content(corpus.parents[1] / "out") == folder_content(corpus.parents[1] / "clean")
    assert (report.empty, report.as_values()["documents_dropped"]) == (2, 3)
    assert f"dropped 3 bad documents, 2 of them empty; the first: {corpus}:4: " in report.describe()


def test_cut_text_files_are_counted(tmp_path: Path, hf_folder: Path) -> None:
    (tmp_path / "long.txt").write_text("\n\n".join(["some words " * 5] * 10))
    (tmp_path / "short.txt").write_text("short")
    report = preprocess(
        PreprocessOptions([f"{tmp_path}/*.txt"], f"{tmp_path}/out/d", str(hf_folder), max_text_chars=120)
    )
    pieces = report.datasets[f"{tmp_path}/out/d"].documents - 1
    assert (report.cut_files, report.pieces) == (1, pieces)
    assert f"cut 1 text files into {pieces} documents" in report.describe()


def test_nothing_but_bad_documents_is_an_error(tmp_path: Path, hf_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n")
    given = PreprocessOptions(
        [str(tmp_path / "a.jsonl")], str(tmp_path / "out/a"), str(hf_folder), skip_bad_documents=True
    )
    with pytest.raises(DataError, match="none of the 1 documents is usable"):
        preprocess(given)


def test_a_second_run_into_its_input_folder_does_not_read_the_first_ones_files(
    corpus: Path, hf_folder: Path
) -> None:
    given = options(corpus, hf_folder, inputs=[str(corpus.parent)], output_prefix=str(corpus.parent / "data"))
    first = preprocess(given)
    second = preprocess(replace(given, overwrite=True))
    other = preprocess(
        replace(given, output_prefix=str(corpus.parent / "other"), inputs=[f"{corpus.parent}/*.js*"])
    )
    counts = [info.documents for report in (first, second, other) for info in report.datasets.values()]
    assert counts == [len(TEXTS)] * 3
    assert not first.left_out
    said = f"not read: 1 x description of a tokenized dataset, first {corpus.parent}/data.json"
    assert said in second.describe() and other.left_out == [said]
    plan = plan_preprocessing(replace(given, overwrite=True)).describe()
    assert said.replace("1 x", "2 x") in plan


def test_an_input_is_never_written_over(corpus: Path, hf_folder: Path) -> None:
    document = corpus.rename(corpus.with_suffix(".json"))
    before = document.read_bytes()
    given = options(document, hf_folder, output_prefix=str(document.with_suffix("")), overwrite=True)
    with pytest.raises(DataError, match=r"corpus\.json is an input and would be written over"):
        preprocess(given)
    assert document.read_bytes() == before


def test_a_plan_estimates_without_writing(corpus: Path, hf_folder: Path) -> None:
    plan = plan_preprocessing(options(corpus, hf_folder, valid_fraction=0.3))
    out = corpus.parents[1] / "out"
    assert not out.exists()
    report = preprocess(options(corpus, hf_folder, valid_fraction=0.3))
    assert plan.whole
    assert plan.sampled_tokens == sum(info.tokens for info in report.datasets.values())
    assert plan.outputs == list(report.datasets)
    assert "all 40 documents" in plan.describe()


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"valid_fraction": 1.0}, "--valid-fraction"),
        ({"valid_fraction": float("nan")}, "--valid-fraction"),
        ({"workers": 0}, "--workers"),
        ({"max_text_chars": 0}, "--max-text-chars"),
        ({"output_prefix": ""}, "--output-prefix"),
        ({"valid_tokens": 0}, "--valid-tokens"),
        ({"valid_token_fraction": 0.0}, "--valid-token-fraction"),
        ({"valid_token_fraction": float("nan")}, "--valid-token-fraction"),
        ({"split_seed": -1}, "--split-seed"),
        ({"valid_tokens": 5, "valid_fraction": 0.1}, "--valid-fraction and --valid-tokens each say how much"),
        ({"valid_tokens": 5, "valid_token_fraction": 0.1}, "--valid-tokens and --valid-token-fraction each"),
    ],
)
def test_options_out_of_range_are_refused(corpus: Path, hf_folder: Path, changes: dict, setting: str) -> None:
    with pytest.raises(ConfigurationError, match=setting):
        options(corpus, hf_folder, **changes)


def run_tool(*arguments: object) -> int:
    return exit_code_of([str(argument) for argument in arguments])


def test_the_tool_prints_what_it_wrote(
    corpus: Path, hf_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = corpus.parents[1] / "out" / "d"
    arguments = ("--input", corpus, "--tokenizer", hf_folder, "--output-prefix", prefix, "--workers", 1)
    assert run_tool(*arguments, "--dry-run") == 0
    assert "all 40 documents" in capsys.readouterr().out
    assert not prefix.parent.exists()
    assert run_tool(*arguments) == 0
    info = read_info(prefix)
    assert info is not None
    assert f"{info.tokens:,}" in capsys.readouterr().out


def test_the_tool_turns_bad_input_into_one_sentence_and_exit_code_2(
    corpus: Path, hf_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with corpus.open("a") as file:
        file.write("\n")
    prefix = corpus.parents[1] / "out" / "d"
    code = run_tool("--input", corpus, "--tokenizer", hf_folder, "--output-prefix", prefix, "--workers", 1)
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert printed.err.splitlines()[-1] == (
        f"error: {corpus}:41: the line is empty: remove it, every line holds one JSON object"
    )


def test_a_full_disk_ends_with_one_sentence_and_an_untouched_folder(
    corpus: Path, hf_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = corpus.parents[1] / "out"
    preprocess(options(corpus, hf_folder))
    before = folder_content(out)
    # A limit on file sizes fails in write(), like a full disk does.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        code = run_tool(
            *("--input", corpus, "--tokenizer", hf_folder, "--output-prefix", out / "data", "--overwrite"),
            *("--workers", 1),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: cannot write {out / 'data'}: ")
    assert folder_content(out) == before


def test_an_unwritable_output_folder_is_named(corpus: Path, hf_folder: Path) -> None:
    in_the_way = corpus.parents[1] / "file"
    in_the_way.write_text("")
    with pytest.raises(DataError, match=f"cannot write {in_the_way}/data: "):
        preprocess(options(corpus, hf_folder, output_prefix=str(in_the_way / "data")))
