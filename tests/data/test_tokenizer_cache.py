from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaTokenizer, Qwen2Tokenizer

from spikingbrain_train.data import tokenizer_cache, tokenizers
from spikingbrain_train.data.tokenizers import HuggingFaceTokenizer, load_tokenizer

TEXTS = [*tokenizers.PROBES, *(topics[key] for key in sorted(topics)[:5]), "a <|end|> b <s> [MASK]"]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tokenizer_cache, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that transformers is asked about."""
    folders: list[Path] = []

    def read(folder: Path) -> Any:
        folders.append(folder)
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)

    monkeypatch.setattr(tokenizers, "read_tokenizer_folder", read)
    return folders


def of_class(kind: str, hf_folder: Path, folder: Path) -> Path:
    """The tokenizer of ``hf_folder`` in a folder of that kind, as published models have them."""
    shutil.copytree(hf_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]
    ]
    if kind in ("qwen2", "llama"):
        cls = Qwen2Tokenizer if kind == "qwen2" else LlamaTokenizer
        cls(vocab=model["vocab"], merges=merges, eos_token="<|end|>").save_pretrained(str(folder))
        config = json.loads((folder / "tokenizer_config.json").read_text())
    elif kind == "generic class of a qwen2":
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    elif kind == "added tokens":
        added = {"content": "[MASK]", "lstrip": True, "rstrip": False, "single_word": False, "special": False}
        config["added_tokens_decoder"] = {"400": added | {"normalized": True}}
        config["extra_special_tokens"] = ["<|fim|>"]
    elif kind == "special tokens are text":
        config["split_special_tokens"] = True
    if kind in ("qwen2", "llama"):
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "kind",
    ["qwen2", "llama", "generic class of a qwen2", "added tokens", "special tokens are text", "as it is"],
)
def test_ids_of_first_and_later_loads_are_those_of_transformers(
    kind: str, hf_folder: Path, tmp_path: Path, own_cache: Path
) -> None:
    """Against transformers left to itself, which reads config.json with the model's own class."""
    folder = of_class(kind, hf_folder, tmp_path / "folder")
    reference = AutoTokenizer.from_pretrained(str(folder))
    first, later = load_tokenizer(folder), load_tokenizer(folder)
    assert len(list(own_cache.iterdir())) == 1
    expected = [reference(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    for tokenizer in (first, later, pickle.loads(pickle.dumps(first)), pickle.loads(pickle.dumps(later))):
        assert tokenizer.encode_batch(TEXTS) == expected
        assert tokenizer.eos_id == reference.eos_token_id
        assert tokenizer.vocab_size == max(reference.get_vocab().values()) + 1
        assert (tokenizer.fingerprint, tokenizer.earlier_fingerprint) == (
            first.fingerprint,
            first.earlier_fingerprint,
        )


def test_transformers_is_asked_once_for_the_same_files(
    hf_folder: Path, tmp_path: Path, own_cache: Path, asked: list[Path]
) -> None:
    folder = shutil.copytree(hf_folder, tmp_path / "folder")
    load_tokenizer(folder)
    load_tokenizer(folder)
    assert asked == [folder]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<|pad|>"}))
    assert load_tokenizer(folder).vocab_size == 401
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    load_tokenizer(folder)
    assert asked == [folder] * 3


def test_a_later_command_imports_neither_transformers_nor_torch(hf_folder: Path, tmp_path: Path) -> None:
    """The whole of it, from the text to the dataset."""
    program = (
        "import sys; from spikingbrain_train.data.command_line import preprocess_data;"
        "preprocess_data(sys.argv[1:]);"
        "print([name in sys.modules for name in ('transformers', 'torch', 'megatron')])"
    )
    (tmp_path / "in.txt").write_text("x = 1")
    arguments = ["--input", str(tmp_path / "in.txt"), "--tokenizer", str(hf_folder), "--workers", "1"]
    arguments += ["--overwrite", "--output-prefix", str(tmp_path / "out/d")]
    said, tokens = [], []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "XDG_CACHE_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(run.stdout.splitlines()[-1])
        tokens.append((tmp_path / "out/d.bin").read_bytes())
    assert said[0].startswith("[True, ") and said[0].endswith("False]")
    assert said[1] == "[False, False, False]"
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("damage", ["", "{", '{"vocab_size": 3}\n{}', "cut"])
def test_a_damaged_cache_is_as_none(
    damage: str, hf_folder: Path, hf_tokenizer: HuggingFaceTokenizer, own_cache: Path, asked: list[Path]
) -> None:
    load_tokenizer(hf_folder)
    (kept,) = own_cache.iterdir()
    kept.write_text(kept.read_text()[:-9] if damage == "cut" else damage)
    assert load_tokenizer(hf_folder).encode("x = 1") == hf_tokenizer.encode("x = 1")
    assert load_tokenizer(hf_folder).fingerprint == hf_tokenizer.fingerprint
    assert len(asked) == 2  # the damaged file was replaced


def test_a_cache_that_cannot_be_written_is_done_without(
    hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tokenizer_cache, "cache_folder", lambda: tmp_path / "file" / "below")
    assert load_tokenizer(hf_folder).vocab_size == 400


def test_the_cache_does_not_grow_without_end(hf_folder: Path, tmp_path: Path, own_cache: Path, asked) -> None:
    for number in range(20):
        load_tokenizer(shutil.copytree(hf_folder, tmp_path / str(number)))
    assert len(list(own_cache.iterdir())) == 16
    load_tokenizer(tmp_path / "19")
    assert len(asked) == 20
