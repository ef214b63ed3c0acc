from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from spikingbrain_train.data.tokenizers import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from spikingbrain_train.errors import DataError

# Everything UTF-8 can spell; surrogates are refused before tokenizing.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
NO_LIMITS = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SPECIAL_SPELLINGS = ["<|end|>", "<s>", "</s>", "<unk>", "<0x41>", "▁"]
"""Texts that a tokenizer has a token or escape for: they need not come back as they were."""


@pytest.fixture(params=["hf", "spm"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(f"{request.param}_tokenizer")


@NO_LIMITS
@given(TEXT)
def test_hugging_face_ids_equal_those_of_transformers(
    hf_folder: Path, hf_tokenizer: HuggingFaceTokenizer, text: str
) -> None:
    expected = _transformers_tokenizer(hf_folder)(text, add_special_tokens=False)["input_ids"]
    assert hf_tokenizer.encode(text) == expected


@NO_LIMITS
@given(TEXT)
def test_sentencepiece_ids_equal_those_of_the_library(
    spm_file: Path, spm_tokenizer: SentencePieceTokenizer, text: str
) -> None:
    assert spm_tokenizer.encode(text) == SentencePieceProcessor(model_file=str(spm_file)).encode(text)


@NO_LIMITS
@given(TEXT)
def test_text_survives_encoding_and_decoding(tokenizer: Tokenizer, text: str) -> None:
    if any(spelling in text for spelling in SPECIAL_SPELLINGS):
        return
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= index < tokenizer.vocab_size for index in ids)


@NO_LIMITS
@given(st.lists(TEXT, max_size=5))
def test_a_batch_is_encoded_like_its_texts(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_eos_and_vocabulary_are_those_of_the_model(
    hf_tokenizer: HuggingFaceTokenizer, spm_tokenizer: SentencePieceTokenizer
) -> None:
    assert (hf_tokenizer.vocab_size, hf_tokenizer.decode([hf_tokenizer.eos_id])) == (400, "<|end|>")
    assert (spm_tokenizer.vocab_size, spm_tokenizer.eos_id) == (500, 2)


def test_a_copy_of_the_files_is_the_same_tokenizer(
    hf_folder: Path,
    hf_tokenizer: HuggingFaceTokenizer,
    spm_file: Path,
    spm_tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
) -> None:
    shutil.copytree(hf_folder, tmp_path / "hf")
    (tmp_path / "spm").mkdir()
    shutil.copy(spm_file, tmp_path / "spm/tokenizer.model")  # under this name a folder does, too
    for folder, tokenizer in (("hf", hf_tokenizer), ("spm", spm_tokenizer)):
        copy = load_tokenizer(tmp_path / folder)
        assert type(copy) is type(tokenizer)
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.encode("def f(x): return 脑") == tokenizer.encode("def f(x): return 脑")


def test_a_worker_process_needs_no_transformers(hf_tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.pickle").write_bytes(pickle.dumps(hf_tokenizer))
    program = (
        "import pickle, sys; t = pickle.load(open(sys.argv[1], 'rb')); print(t.encode('x = 1'));"
        "assert 'transformers' not in sys.modules and 'torch' not in sys.modules"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "tokenizer.pickle")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stdout) == hf_tokenizer.encode("x = 1")


def test_fingerprint_tells_merges_apart_where_the_vocabulary_is_equal(
    hf_folder: Path, hf_tokenizer: HuggingFaceTokenizer, tmp_path: Path
) -> None:
    other = shutil.copytree(hf_folder, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:2]
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(other).fingerprint != hf_tokenizer.fingerprint


def test_stored_truncation_does_not_cut_documents(hf_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(hf_folder, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(other).decode(load_tokenizer(other).encode("a b c d e f g h")) == "a b c d e f g h"


def test_missing_or_foreign_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"\0")
    (tmp_path / "garbage.model").write_bytes(b"not a model")
    (tmp_path / "zero.model").write_bytes(b"")
    for name, reason in [
        ("absent", "there is no tokenizer at"),
        ("empty", "holds no tokenizer files"),
        ("weights.bin", "is not a tokenizer"),
        ("garbage.model", "not a readable sentencepiece model"),
        ("zero.model", "sentencepiece"),
    ]:
        with pytest.raises(DataError, match=reason) as caught:
            load_tokenizer(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_damaged_tokenizer_json_is_refused(hf_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hf_folder, tmp_path / "damaged")
    content = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(content[: len(content) // 2])
    with pytest.raises(DataError, match="damaged holds no tokenizer that transformers can load"):
        load_tokenizer(folder)


def test_a_tokenizer_without_eos_is_refused(hf_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hf_folder, tmp_path / "no_eos")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match="names no end-of-sequence token"):
        load_tokenizer(folder)


def test_code_in_a_tokenizer_folder_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "tokenization_own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass OwnTokenizer: pass\n"
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "OwnTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer"] * 2},
            }
        )
    )
    with pytest.raises(DataError, match="remote holds no tokenizer that transformers can load"):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


_loaded: dict[Path, AutoTokenizer] = {}


def _transformers_tokenizer(folder: Path) -> AutoTokenizer:
    if folder not in _loaded:
        _loaded[folder] = AutoTokenizer.from_pretrained(str(folder))
    return _loaded[folder]


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("normalizer", {"type": "NFC"}),
        ("normalizer", {"type": "Lowercase"}),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
        (
            "pre_tokenizer",
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"String": "e"}, "behavior": "Isolated", "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
                ],
            },
        ),
    ],
    ids=["composed characters", "case", "leading space", "words"],
)
def test_fingerprint_tells_apart_what_splits_text_differently(
    hf_folder: Path, hf_tokenizer: HuggingFaceTokenizer, tmp_path: Path, part: str, change: dict
) -> None:
    other = shutil.copytree(hf_folder, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content[part] = change
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(other).fingerprint != hf_tokenizer.fingerprint


def test_fingerprint_does_not_depend_on_tokens_that_a_class_adds(
    hf_folder: Path, hf_tokenizer: HuggingFaceTokenizer, tmp_path: Path
) -> None:
    other = shutil.copytree(hf_folder, tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<|pad|>"}))
    assert load_tokenizer(other).vocab_size == hf_tokenizer.vocab_size + 1
    assert load_tokenizer(other).fingerprint == hf_tokenizer.fingerprint
