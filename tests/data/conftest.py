"""Small real tokenizers, trained here, and datasets with known tokens."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from spikingbrain_train.data import tokenizer_cache
from spikingbrain_train.data.domains import DomainTable
from spikingbrain_train.data.indexed import IndexedDatasetWriter
from spikingbrain_train.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

TRAINING_TEXT = [topics[key] for key in sorted(topics)[:12]]


@pytest.fixture(scope="session", autouse=True)
def tokenizer_cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept in the cache of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_cache, "cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 tokens, saved by transformers."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(TRAINING_TEXT, trainer)
    folder = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|end|>").save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def spm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A unigram sentencepiece model of 500 pieces that loses nothing: bytes for unknown characters, no
    rewriting."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TRAINING_TEXT for line in text.splitlines() if line),
        model_writer=model,
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("spm") / "tiny.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def hf_tokenizer(hf_folder: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(hf_folder)


@pytest.fixture(scope="session")
def spm_tokenizer(spm_file: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(spm_file)


class CountingTokenizer:
    """Stands for a tokenizer where only its description matters; its tokens are written directly."""

    name = "counting"
    eos_id = 0
    fingerprint = "counting"
    earlier_fingerprint = ""

    def __init__(self, vocab_size: int = 100_000) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


WriteTokens = Callable[..., str]


@pytest.fixture
def write_tokens(tmp_path: Path) -> WriteTokens:
    """Write documents of given token ids; returns the prefix."""

    def write(
        name: str,
        documents: Sequence[Sequence[int]],
        tokenizer: Tokenizer | None = None,
        domains: Sequence[str] | None = None,
    ) -> str:
        staging = tmp_path / f"staging_{name}"
        staging.mkdir()
        table = None if domains is None else DomainTable()
        writer = IndexedDatasetWriter(tmp_path / name, tokenizer or CountingTokenizer(), staging, table)
        numbers = None if table is None else table.numbers(domains or [])
        for number, document in enumerate(documents):
            ids = np.asarray(document, dtype=writer.dtype)
            domain = None if numbers is None else numbers[number : number + 1]
            writer.add_documents(ids, np.array([len(ids)]), 1, domain)
        writer.finish()
        writer.publish()
        staging.rmdir()
        return str(tmp_path / name)

    return write
