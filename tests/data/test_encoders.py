"""Faster ways from text to ids, against the tokenizer itself."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from spikingbrain_train.data.encoders import TokenizerBackend, choose_encoder
from spikingbrain_train.data.preprocess import plan_preprocessing, preprocess
from spikingbrain_train.data.preprocess_options import PreprocessOptions
from spikingbrain_train.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer
from spikingbrain_train.data.word_cache import _PATTERNS, WordCache, cuts_at_spaces
from spikingbrain_train.errors import ConfigurationError

SAMPLE = [topics[key] for key in sorted(topics)[:12]]
GPT2, LLAMA3, QWEN = sorted(_PATTERNS, key=lambda pattern: (pattern[0] == "(", "{1,3}" not in pattern))
SPLITTERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm2": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    **{
        name: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        for name, pattern in (("llama3", LLAMA3), ("qwen", QWEN))
    },
}


def save(folder: Path, splitter: pre_tokenizers.PreTokenizer, *, without: str = "", **tokens: bool) -> Path:
    """A BPE over bytes with an end-of-sequence token, without the pieces of some characters."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer, rust.decoder, rust.normalizer = splitter, decoders.ByteLevel(), normalizers.NFC()
    alphabet = [piece for piece in pre_tokenizers.ByteLevel.alphabet() if piece not in without]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    rust.train_from_iterator(SAMPLE, trainer)
    PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|end|>").save_pretrained(str(folder))
    if tokens:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        content["added_tokens"][0].update(tokens)
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HuggingFaceTokenizer]:
    folder = tmp_path_factory.mktemp("splitters")
    return {name: HuggingFaceTokenizer(save(folder / name, each)) for name, each in SPLITTERS.items()}


LETTERS = list(" \t\n\r\u00a0\u2003\x1c'\u2019srtvdmlL109.,/!-_aZ\u00e9\u0301脑\u0622ー🧠\u200d")
HARD = st.text(st.one_of(st.sampled_from(LETTERS), st.characters(exclude_categories=("Cs",))), max_size=40)
WORDS = st.lists(st.sampled_from(["it's", " ", "<|end|>", "12", "x ", ".", "(", "\n", "\t", "ab"])).map(
    "".join
)


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(st.one_of(HARD, WORDS)))
def test_ids_of_words_are_those_of_whole_texts(
    tokenizers: dict[str, HuggingFaceTokenizer], texts: list[str]
) -> None:
    for name, tokenizer in tokenizers.items():
        assert cuts_at_spaces(tokenizer), name
        ids, lengths = WordCache(tokenizer).encode(texts)
        expected = tokenizer.encode_batch(texts)
        assert lengths.tolist() == [len(each) for each in expected]
        assert ids.tolist() == [index for each in expected for index in each], name


def test_a_cache_that_travels_or_overflows_gives_the_same(
    tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = WordCache(tokenizers["qwen"])
    monkeypatch.setattr("spikingbrain_train.data.word_cache._MOST_CHARACTERS", 5000)
    ids = [index for each in tokenizers["qwen"].encode_batch(SAMPLE) for index in each]
    for encoder in (words, words, pickle.loads(pickle.dumps(words))):
        assert encoder.encode(SAMPLE)[0].tolist() == ids
    assert encoder.encode([])[0].tolist() == []


@pytest.mark.parametrize(
    ("splitter", "tokens"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=True), {}),
        (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), {}),
        (pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated"), {}),
        (pre_tokenizers.Metaspace(), {}),
        (SPLITTERS["gpt2"], {"rstrip": True}),
        (SPLITTERS["gpt2"], {"single_word": True}),
    ],
)
def test_other_ways_to_split_are_not_cut(tmp_path: Path, splitter, tokens: dict) -> None:
    assert not cuts_at_spaces(HuggingFaceTokenizer(save(tmp_path, splitter, **tokens)))


def test_gigatoken_is_used_where_it_gives_the_same_ids(tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    tokenizer = HuggingFaceTokenizer(save(tmp_path, SPLITTERS["qwen"]))
    chosen = choose_encoder(tokenizer, TokenizerBackend.auto, SAMPLE)
    assert chosen.name == "gigatoken" and "for 12 of the documents" in chosen.said
    for encoder in (chosen.encoder, pickle.loads(pickle.dumps(chosen.encoder))):
        ids, lengths = encoder.encode(SAMPLE[3:])
        expected = tokenizer.encode_batch(SAMPLE[3:])
        assert lengths.tolist() == [len(each) for each in expected]
        assert np.array_equal(ids, np.concatenate(expected))
    other = choose_encoder(tokenizer, TokenizerBackend.tokenizers, SAMPLE)
    assert (other.name, other.said) == ("tokenizers", "tokenized by tokenizers; ids of words are kept")


def test_gigatoken_takes_a_vocabulary_that_lacks_bytes(tmp_path: Path) -> None:
    """As SmolLM2's does: texts in which they turn up get the tokenizer's own ids."""
    pytest.importorskip("gigatoken")
    byte_4, of_cyrillic = "\u0104", "\u00d0"  # how byte-level pieces are written
    tokenizer = HuggingFaceTokenizer(save(tmp_path, SPLITTERS["gpt2"], without=byte_4 + of_cyrillic))
    chosen = choose_encoder(tokenizer, TokenizerBackend.gigatoken, SAMPLE)
    texts = ["a\x04b", SAMPLE[0], "\x04", "Ночь и улица", "", "<|end|>\x04", SAMPLE[1] + "\x04" + SAMPLE[1]]
    assert len(tokenizer.encode_batch(["\x04"])[0]) == 0
    for encoder in (chosen.encoder, pickle.loads(pickle.dumps(chosen.encoder))):
        ids, lengths = encoder.encode(texts)
        expected = tokenizer.encode_batch(texts)
        assert lengths.tolist() == [len(each) for each in expected]
        assert ids.tolist() == [index for each in expected for index in each]


def test_gigatoken_is_refused_in_a_sentence_where_it_cannot_be_had(
    tmp_path: Path, spm_tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = HuggingFaceTokenizer(save(tmp_path / "digits", SPLITTERS["smollm2"]))
    split = HuggingFaceTokenizer(save(tmp_path / "split", SPLITTERS["gpt2"]))
    split._backend.encode_special_tokens = True  # special tokens in texts are text, which gigatoken cannot do

    def said(tokenizer: HuggingFaceTokenizer | SentencePieceTokenizer, reason: str) -> None:
        chosen = choose_encoder(tokenizer, TokenizerBackend.auto, SAMPLE)
        assert chosen.name != "gigatoken" and "gigatoken is not used: " in chosen.said
        assert reason in chosen.said
        assert np.array_equal(
            chosen.encoder.encode(SAMPLE)[0], np.concatenate(tokenizer.encode_batch(SAMPLE))
        )
        with pytest.raises(ConfigurationError, match="cannot be had: .*; leave it at auto") as caught:
            choose_encoder(tokenizer, TokenizerBackend.gigatoken, SAMPLE)
        assert reason in str(caught.value) and "\n" not in str(caught.value)

    said(spm_tokenizer, "this is a sentencepiece model")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gigatoken", None)
        said(digits, "it is not installed (pip install 'spikingbrain-train[gigatoken]')")
    pytest.importorskip("gigatoken")
    said(digits, "it does not take this tokenizer (Unsupported pre_tokenizer type: Sequence")
    said(split, "it gives other ids, as for a text that begins with 'a<|end|> b<|end|>")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dataset_is_the_same_whoever_tokenizes(tmp_path: Path, workers: int) -> None:
    pytest.importorskip("gigatoken")
    folder = save(tmp_path / "tokenizer", SPLITTERS["qwen"])
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SAMPLE * 3))
    written = {}
    for backend in (TokenizerBackend.gigatoken, TokenizerBackend.tokenizers):
        out = tmp_path / backend.name
        inputs, prefix = [str(tmp_path / "in.jsonl")], str(out / "d")
        options = PreprocessOptions(inputs, prefix, str(folder), workers=workers, tokenizer_backend=backend)
        assert f"tokenized by {backend.name}" in plan_preprocessing(options).describe()
        report = preprocess(options)
        assert f"tokenized by {backend.name}" in report.describe()
        assert report.as_values()["tokenized_by"].startswith(f"tokenized by {backend.name}")
        written[backend] = {path.name: path.read_bytes() for path in out.iterdir()}
    one, other = written.values()
    assert one == other
