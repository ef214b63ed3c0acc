from __future__ import annotations

import json
import random
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikingbrain_train.data import split_writers
from spikingbrain_train.data.indexed import TokenFile, document_starts, read_info
from spikingbrain_train.data.preprocess import preprocess
from spikingbrain_train.data.preprocess_options import PreprocessOptions
from spikingbrain_train.data.preprocess_report import HeldOut, PreprocessReport
from spikingbrain_train.data.split import is_among, place_of, split_by_tokens
from spikingbrain_train.errors import DataError

TEXTS = [topics[key] for key in sorted(topics)]
# Few places, so that copies occur; lengths from one token to a book.
DOCUMENTS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 10_000)), min_size=2, max_size=30)
EXAMPLES = settings(deadline=None, max_examples=300)


@EXAMPLES
@given(DOCUMENTS, st.integers(1, 400_000))
def test_no_other_cut_of_the_order_comes_nearer(documents: list[tuple[int, int]], wanted: int) -> None:
    places = np.array([place for place, _ in documents], dtype=np.uint64)
    lengths = np.array([length for _, length in documents], dtype=np.int32)
    cuts = sorted(set(places.tolist()))[:-1]
    if not cuts:
        with pytest.raises(DataError, match="only one document"):
            split_by_tokens(places, lengths, wanted)
        return
    split = split_by_tokens(places, lengths, wanted)
    held_out, kept = places[split.held_out], places[~split.held_out]
    assert len(held_out) and len(kept)
    assert held_out.max() < kept.min()  # so copies, which have one place, are together
    assert split.tokens == lengths[split.held_out].sum()
    of_cuts = [int(lengths[places <= cut].sum()) for cut in cuts]
    assert abs(split.tokens - wanted) == min(abs(tokens - wanted) for tokens in of_cuts)
    nearest = [tokens for tokens in of_cuts if abs(tokens - wanted) == abs(split.tokens - wanted)]
    assert split.tokens == min(nearest)


@EXAMPLES
@given(DOCUMENTS, st.data())
def test_the_error_is_at_most_half_of_the_document_at_the_edge(documents, data: st.DataObject) -> None:
    places = np.arange(len(documents), dtype=np.uint64)
    lengths = np.array([length for _, length in documents], dtype=np.int32)
    first, last = int(lengths[0]), int(lengths[:-1].sum())
    wanted = data.draw(st.integers(first, last))
    split = split_by_tokens(places, lengths, wanted)
    assert 2 * abs(split.tokens - wanted) <= split.edge_tokens
    assert split.tokens == wanted or split.edge_tokens in lengths


@EXAMPLES
@given(DOCUMENTS, st.integers(1, 100_000), st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_matter(documents, wanted: int, shuffler: random.Random) -> None:
    def held_out(given: list[tuple[int, int]]) -> list[tuple[int, int]]:
        places, lengths = (np.array(column) for column in zip(*given, strict=True))
        split = split_by_tokens(places.astype(np.uint64), lengths, wanted)
        return sorted(document for document, out in zip(given, split.held_out, strict=True) if out)

    if len({place for place, _ in documents}) < 2:
        return
    shuffled = list(documents)
    shuffler.shuffle(shuffled)
    assert held_out(shuffled) == held_out(documents)


def test_places_are_those_of_earlier_releases_and_spread_evenly() -> None:
    assert place_of("a document") == 0x7CC11ABFA1CE1DFF
    assert place_of("a document", 1) != place_of("a document")
    places = [place_of(str(number), seed) for number in range(2000) for seed in (0, 7)]
    share = sum(is_among(place, 0.25) for place in places) / len(places)
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / len(places)) ** 0.5


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def documents(prefix: str) -> list[list[int]]:
    dataset = TokenFile(prefix)
    starts = document_starts(dataset)
    return [dataset.read(a, b - a).tolist() for a, b in zip(starts[:-1], starts[1:], strict=True)]


def run(tmp_path: Path, tokenizer: Path, name: str = "out", **changes: object) -> PreprocessReport:
    prefix = str(tmp_path / name / "d")
    return preprocess(PreprocessOptions([str(tmp_path / "in.jsonl")], prefix, str(tokenizer), **changes))


@pytest.mark.parametrize("block", [1, 777, 1 << 22])
def test_tokens_are_held_out_in_whole_documents_that_keep_their_order(
    tmp_path: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(split_writers, "_BLOCK_TOKENS", block)
    write(tmp_path / "in.jsonl", TEXTS)
    run(tmp_path, hf_folder, "whole")
    report = run(tmp_path, hf_folder, valid_tokens=20_000)
    whole = documents(str(tmp_path / "whole/d"))
    train, valid = (documents(str(tmp_path / f"out/d_{side}")) for side in ("train", "valid"))
    left = iter(train), iter(valid)
    pending = [next(left[0]), next(left[1])]
    for document in whole:  # a merge of both sides, each in its order
        side = pending.index(document)
        pending[side] = next(left[side], [])
    assert pending == [[], []]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"d_{side}.{suffix}" for side in ("train", "valid") for suffix in ("bin", "idx", "json")
    }
    held = report.held_out
    assert held is not None and held.tokens == sum(map(len, valid))
    assert (held.documents, held.of_documents) == (len(valid), len(whole))
    assert 2 * abs(held.tokens - 20_000) <= held.edge_tokens
    infos = [read_info(tmp_path / f"out/d_{side}") for side in ("train", "valid")]
    assert sum(info.text_bytes for info in infos if info) == sum(len(text.encode()) for text in TEXTS)
    word = "next" if held.tokens < 20_000 else "last"
    assert (
        f"({held.share_of_tokens:.2%}) for --valid-tokens 20,000: documents stay whole, and the {word} "
        f"one has {held.edge_tokens:,} tokens"
    ) in report.describe()


def test_held_out_tokens_depend_on_texts_and_seed_alone(tmp_path: Path, hf_folder: Path) -> None:
    write(tmp_path / "in.jsonl", TEXTS)
    run(tmp_path, hf_folder, valid_token_fraction=0.2)
    run(tmp_path, hf_folder, "other", valid_token_fraction=0.2, split_seed=5)
    shuffled = TEXTS * 2
    random.Random(0).shuffle(shuffled)
    write(tmp_path / "in.jsonl", shuffled)
    run(tmp_path, hf_folder, "again", valid_token_fraction=0.2)
    first, other, again = (documents(str(tmp_path / name / "d_valid")) for name in ("out", "other", "again"))
    assert sorted(again) == sorted(first * 2)
    assert sorted(other) != sorted(first)
    share = TokenFile(str(tmp_path / "other/d_valid")).num_tokens / sum(
        TokenFile(str(tmp_path / f"other/d_{side}")).num_tokens for side in ("train", "valid")
    )
    assert abs(share - 0.2) < 0.05


def test_what_cannot_be_held_out_is_refused_and_leaves_nothing(tmp_path: Path, hf_folder: Path) -> None:
    write(tmp_path / "in.jsonl", TEXTS[:5])
    with pytest.raises(DataError, match=r"--valid-tokens 9999999 leaves nothing to train on: .* have"):
        run(tmp_path, hf_folder, valid_tokens=9_999_999)
    write(tmp_path / "in.jsonl", TEXTS[:1] * 3)
    with pytest.raises(DataError, match=r"only one document \(or copies of one\)"):
        run(tmp_path, hf_folder, valid_token_fraction=0.5)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_fraction_of_documents_far_from_that_of_tokens_is_said() -> None:
    held = HeldOut("--valid-fraction", 0.15, documents=11, of_documents=79, tokens=2900, of_tokens=100_000)
    assert held.describe() == (
        "held out 11 of 79 documents (13.92%) with 2,900 of 100,000 tokens (2.90%) for --valid-fraction 0.15"
    )
    assert held.warnings() == [
        "--valid-fraction 0.15 counts documents, and those held out have 2.90% of the tokens: "
        "--valid-token-fraction 0.15 counts tokens"
    ]
    near = HeldOut("--valid-fraction", 0.15, documents=11, of_documents=79, tokens=12_000, of_tokens=100_000)
    assert near.warnings() == []
    coarse = HeldOut("--valid-tokens", 100, documents=1, of_documents=9, tokens=900, of_tokens=9000)
    assert "--valid-tokens 100 asks for 100 tokens, but documents are held out whole" in coarse.warnings()[0]
