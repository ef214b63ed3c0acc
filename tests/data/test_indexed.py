from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from spikingbrain_train.data import token_file
from spikingbrain_train.data.indexed import (
    TokenFile,
    check_same_tokenizer,
    document_starts,
    open_indexed_dataset,
    token_dtype,
)
from spikingbrain_train.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer
from spikingbrain_train.data.verification import verify_dataset
from spikingbrain_train.errors import DataError
from tests.data.conftest import CountingTokenizer, WriteTokens

FILES = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
DOCUMENTS = [[5, 6, 7, 0], [8, 0], [9, 10, 11, 12, 13, 0]]


def test_tokens_are_read_across_documents(write_tokens) -> None:
    dataset = open_indexed_dataset(write_tokens("d", DOCUMENTS))
    stream = sum(DOCUMENTS, [])
    assert dataset.num_tokens == len(stream)
    for start in range(len(stream)):
        for count in range(1, len(stream) - start + 1):
            tokens = dataset.read(start, count)
            assert tokens.dtype == dataset.dtype
            assert tokens.tolist() == stream[start : start + count]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(write_tokens, suffix: str) -> None:
    prefix = write_tokens("d", DOCUMENTS)
    Path(prefix + suffix).unlink()
    with pytest.raises(DataError, match=rf"no indexed dataset at .*d \(.*d\{suffix} is missing\)"):
        open_indexed_dataset(prefix)


@FILES
@given(st.data())
def test_a_truncated_file_is_refused(write_tokens, tmp_path: Path, data: st.DataObject) -> None:
    prefix = str(tmp_path / "d") if (tmp_path / "d.bin").exists() else write_tokens("d", DOCUMENTS)
    path = Path(prefix + data.draw(st.sampled_from([".bin", ".idx"])))
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    try:
        with pytest.raises(DataError, match=str(path)):
            open_indexed_dataset(prefix)
    finally:
        path.write_bytes(content)


@FILES
@given(st.data())
def test_a_damaged_index_is_refused_or_harmless(write_tokens, tmp_path: Path, data: st.DataObject) -> None:
    prefix = str(tmp_path / "d") if (tmp_path / "d.bin").exists() else write_tokens("d", DOCUMENTS)
    path = Path(prefix + ".idx")
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    try:
        dataset = open_indexed_dataset(prefix)
    except DataError:
        pass
    else:
        assert (np.diff(document_starts(dataset)) > 0).all()
        # Only inner document boundaries may differ, which the token stream does not depend on.
        assert dataset.read(0, dataset.num_tokens).tolist() == sum(DOCUMENTS, [])
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("boundaries", [[1, 1, 2, 3], [-1, 1, 2, 3], [0, 2, 1, 3], [0, 9, 2, 3]])
def test_document_boundaries_that_do_not_ascend_from_0_are_refused(write_tokens, boundaries) -> None:
    prefix = write_tokens("d", DOCUMENTS)
    path = Path(prefix + ".idx")
    path.write_bytes(path.read_bytes()[:-32] + np.asarray(boundaries, dtype=np.int64).tobytes())
    with pytest.raises(DataError, match=r"d\.idx contradicts itself"):
        open_indexed_dataset(prefix)


def test_many_datasets_are_read_through_few_open_files(write_tokens, tmp_path: Path) -> None:
    original = write_tokens("d", DOCUMENTS)
    datasets = []
    for number in range(100):
        for suffix in (".bin", ".idx"):
            (tmp_path / f"{number}{suffix}").symlink_to(original + suffix)
        datasets.append(TokenFile(str(tmp_path / str(number))))
    before = len(os.listdir("/proc/self/fd"))
    for dataset in (*datasets, *reversed(datasets)):
        assert dataset.read(0, 12).tolist() == sum(DOCUMENTS, [])
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    token_file._opened.cache_clear()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_files_of_different_runs_are_refused(write_tokens) -> None:
    first, second = write_tokens("a", DOCUMENTS), write_tokens("b", DOCUMENTS[:2])
    Path(first + ".json").write_bytes(Path(second + ".json").read_bytes())
    with pytest.raises(DataError, match="speaks of 6 tokens but .* holds 12"):
        open_indexed_dataset(first)
    Path(first + ".idx").write_bytes(Path(second + ".idx").read_bytes())
    with pytest.raises(DataError, match="a.bin is 48 bytes long instead of 24"):
        open_indexed_dataset(first)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"tokens": 12}', '{"tokens": "many"}'])
def test_a_malformed_sidecar_is_refused(write_tokens, content: str) -> None:
    prefix = write_tokens("d", DOCUMENTS)
    Path(prefix + ".json").write_text(content)
    with pytest.raises(DataError, match="d.json is not the description of an indexed dataset"):
        open_indexed_dataset(prefix)


def test_a_dataset_without_tokens_is_refused(write_tokens) -> None:
    with pytest.raises(DataError, match="holds no tokens"):
        open_indexed_dataset(write_tokens("d", []))


def test_a_vocabulary_larger_than_the_models_is_refused(write_tokens) -> None:
    prefix = write_tokens("d", DOCUMENTS)
    open_indexed_dataset(prefix, vocab_size=100_000)
    with pytest.raises(DataError, match="100000 ids but the model's vocabulary has only 49152"):
        open_indexed_dataset(prefix, vocab_size=49152)


def test_tokens_of_another_tokenizer_are_refused(
    write_tokens, hf_tokenizer: HuggingFaceTokenizer, spm_tokenizer: SentencePieceTokenizer
) -> None:
    prefix = write_tokens("d", DOCUMENTS, hf_tokenizer)
    check_same_tokenizer(prefix, hf_tokenizer)
    with pytest.raises(DataError, match="which is not the run's tokenizer tiny.model"):
        check_same_tokenizer(prefix, spm_tokenizer)


def test_a_dataset_with_a_fingerprint_of_an_earlier_version_is_known(
    write_tokens, hf_tokenizer: HuggingFaceTokenizer, spm_tokenizer: SentencePieceTokenizer
) -> None:
    """SHA-256 of the vocabulary, the ids of one probe and the end-of-sequence id, as JSON."""
    vocabulary = json.loads((hf_tokenizer.folder / "tokenizer.json").read_text())["model"]["vocab"]
    pieces = sorted([index, token] for token, index in vocabulary.items())
    probe = "The quick brown fox, 12345 × 0.5!\n\tdef f(x):\r\n  return x  # naïve — 脑 脉冲 🧠"
    content = json.dumps([pieces, hf_tokenizer.encode(probe), hf_tokenizer.eos_id], separators=(",", ":"))
    prefix = write_tokens("d", DOCUMENTS)
    sidecar = Path(prefix + ".json")
    fields = json.loads(sidecar.read_text())
    fields["tokenizer_fingerprint"] = hashlib.sha256(content.encode("ascii")).hexdigest()
    sidecar.write_text(json.dumps(fields))
    check_same_tokenizer(prefix, hf_tokenizer)
    with pytest.raises(DataError, match="which is not the run's tokenizer tiny.model"):
        check_same_tokenizer(prefix, spm_tokenizer)


@pytest.mark.parametrize("vocab_size", [400, 100_000])
@pytest.mark.parametrize("documents", [[], DOCUMENTS, [[1], [2] * 5000, [3, 4]]], ids=["none", "few", "long"])
def test_the_files_are_those_that_megatron_writes(
    write_tokens, tmp_path: Path, vocab_size: int, documents: list[list[int]]
) -> None:
    assert token_dtype(vocab_size) is DType.optimal_dtype(vocab_size)
    prefix = write_tokens("d", documents, CountingTokenizer(vocab_size))
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=token_dtype(vocab_size))
    for document in documents:
        builder.add_document(np.asarray(document), [len(document)])
    builder.finalize(str(tmp_path / "m.idx"))
    for suffix in (".bin", ".idx"):
        assert Path(prefix + suffix).read_bytes() == (tmp_path / f"m{suffix}").read_bytes()


def test_a_dataset_that_megatron_wrote_works_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    for document in DOCUMENTS:
        builder.add_document(np.asarray(document), [len(document)])
    builder.finalize(str(tmp_path / "m.idx"))
    with caplog.at_level(logging.WARNING):
        dataset = open_indexed_dataset(tmp_path / "m", vocab_size=14)
    assert dataset.num_tokens == 12
    assert "its tokenizer is unknown" in caplog.text


def test_the_sidecar_is_plain_json(write_tokens) -> None:
    fields = json.loads(Path(write_tokens("d", DOCUMENTS) + ".json").read_text())
    assert (fields["documents"], fields["tokens"], fields["dtype"]) == (3, 12, "int32")


def test_a_dataset_is_held_to_what_was_written_with_it(write_tokens: WriteTokens) -> None:
    prefix = write_tokens("d", [range(1, 60), range(5)], domains=["a", "b"])
    size = sum(os.path.getsize(f"{prefix}{suffix}") for suffix in (".bin", ".idx", ".domains.npy"))
    said = f"{prefix}: 64 tokens as int32; 3 files, {size} bytes, are as they were written"
    assert verify_dataset(prefix) == said

    def refused(suffix: str, damage: Callable[[bytes], bytes], *, by_runs: bool) -> str:
        path = Path(prefix + suffix)
        before = path.read_bytes()
        path.write_bytes(damage(before))
        with pytest.raises(DataError) as caught:
            verify_dataset(prefix)
        if by_runs:
            with pytest.raises(DataError, match=re.escape(str(caught.value))):
                open_indexed_dataset(prefix)
        else:
            open_indexed_dataset(prefix)
        path.write_bytes(before)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    flipped = refused(".bin", lambda content: b"\x02" + content[1:], by_runs=False)
    assert flipped.startswith(f"{prefix}.bin is as long as it was written, but its bytes are others (CRC-32")
    assert ".bin" in refused(".bin", lambda content: content[:-4], by_runs=True)
    assert ".domains.npy" in refused(".domains.npy", lambda content: content[:-1], by_runs=True)
    as_int16 = refused(".json", lambda content: content.replace(b'"int32"', b'"uint16"'), by_runs=True)
    assert "stored as uint16, but" in as_int16 and "has them as int32" in as_int16

    sidecar = json.loads(Path(f"{prefix}.json").read_text())
    del sidecar["checksums"]
    Path(f"{prefix}.json").write_text(json.dumps(sidecar))
    assert verify_dataset(prefix).endswith("sizes fit, and no checksums were written with it")
