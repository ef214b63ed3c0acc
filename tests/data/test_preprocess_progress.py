"""A preprocessing that was killed or interrupted goes on, to the bytes of one that was not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from spikingbrain_train.data import preprocess_progress, tokenize_documents
from spikingbrain_train.data.preprocess import preprocess
from spikingbrain_train.data.preprocess_options import PreprocessOptions
from tests.data.preprocess_command import exit_code_of

TEXTS = [topics[key] for key in sorted(topics)[:40]]
KILLED = """
import os, signal, sys
from spikingbrain_train.data import preprocess_progress, tokenize_documents
from tests.data.preprocess_command import exit_code_of

preprocess_progress._SECONDS, tokenize_documents._CHUNK_DOCUMENTS = 0.0, 4
add = preprocess_progress.Progress.add
chunks = []

def add_and_die(*arguments):
    add(*arguments)
    chunks.append(0)
    if len(chunks) == 4:
        os.kill(os.getpid(), signal.SIGKILL)

preprocess_progress.Progress.add = add_and_die
exit_code_of(sys.argv[1:])
"""
"""The command, killed as by kill -9 behind 16 of 40 documents."""
SPLITS = {
    "whole": (),
    "documents": ("--valid-fraction", "0.3", "--domain-key", "of"),
    "tokens": ("--valid-tokens", "4000"),
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    records = [{"text": text, "of": f"domain {number % 3}"} for number, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Documents of every chunk that is tokenized in this process, which takes 4 at a time."""
    found: list[int] = []
    tokenize = tokenize_documents.tokenize

    def counting(chunk: tokenize_documents.Chunk, *arguments: object) -> tokenize_documents.TokenizedChunk:
        found.append(len(chunk.documents))
        return tokenize(chunk, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tokenize_documents, "_CHUNK_DOCUMENTS", 4)
    monkeypatch.setattr(tokenize_documents, "tokenize", counting)
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_command_goes_on_where_it_was_killed(
    corpus: Path, hf_folder: Path, counted: list[int], split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def arguments(folder: str) -> list[str]:
        out = corpus.parent / folder / "d"
        given = ["--input", str(corpus), "--tokenizer", str(hf_folder), "--output-prefix", str(out)]
        return [*given, "--workers", "1", *SPLITS[split]]

    assert exit_code_of(arguments("undisturbed")) == 0
    assert sum(counted) == 40
    counted.clear()

    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments("killed")], capture_output=True, text=True
    )
    assert killed.returncode == -9, killed.stderr
    assert content(corpus.parent / "killed") == {}, "nothing has its final name"
    capsys.readouterr()
    assert exit_code_of(arguments("killed")) == 0
    assert sum(counted) == 24, "16 documents are not tokenized again"
    assert "went on where an earlier call had stopped" in capsys.readouterr().out
    assert content(corpus.parent / "killed") == content(corpus.parent / "undisturbed")
    assert [path for path in (corpus.parent / "killed").iterdir() if path.is_dir()] == []


def test_what_cannot_be_gone_on_with_starts_anew(
    corpus: Path, hf_folder: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess_progress, "_SECONDS", 0.0)
    add = preprocess_progress.Progress.add
    prefix = corpus.parent / "out" / "d"
    options = PreprocessOptions([str(corpus)], str(prefix), str(hf_folder))

    def interrupted_at(chunks: int) -> Path:
        done: list[int] = []

        def add_and_stop(*arguments: object) -> None:
            add(*arguments)  # type: ignore[arg-type]
            done.append(0)
            if len(done) == chunks:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(preprocess_progress.Progress, "add", add_and_stop)
            with pytest.raises(KeyboardInterrupt):
                preprocess(options)
        (staging,) = (path for path in prefix.parent.iterdir() if path.is_dir())
        counted.clear()
        return staging

    # An interrupt in what goes on after an interrupt.
    interrupted_at(2)
    interrupted_at(3)
    preprocess(options)
    assert sum(counted) == 20
    expected = content(prefix.parent)

    def starts_anew(changed: PreprocessOptions = options) -> None:
        preprocess(replace(changed, overwrite=True))
        assert sum(counted) == 40

    for path in prefix.parent.iterdir():
        path.unlink()
    tokens = interrupted_at(3) / "d.bin"
    tokens.write_bytes(b"\xff" + tokens.read_bytes()[1:])
    starts_anew()
    assert content(prefix.parent) == expected
    for path in prefix.parent.iterdir():
        path.unlink()
    journal = interrupted_at(3) / "progress.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])  # half a line: the one before it counts
    preprocess(replace(options, overwrite=True))
    assert sum(counted) == 32 and content(prefix.parent) == expected
    for path in prefix.parent.iterdir():
        path.unlink()
    interrupted_at(3)
    starts_anew(replace(options, valid_fraction=0.2))
    interrupted_at(3)
    corpus.write_text(corpus.read_text() + json.dumps({"text": "one more", "of": "a"}) + "\n")
    preprocess(replace(options, overwrite=True))
    assert sum(counted) == 41
