"""The tokenizer of a GGUF file: byte-level BPE, as convert_hf_to_gguf.py of llama.cpp writes it.

llama.cpp has a name for each way to cut text before merges (``tokenizer.ggml.pre``). Its own script finds
the name by hashing a sample's ids, which only works for vocabularies that it has seen. Here it is what the
tokenizer says of its ``pre_tokenizer``; the patterns are those in src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spikingbrain_train.data.tokenizer_folder import first_line, read_tokenizer_folder
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage.tokenizer_files import has_tokenizer

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_NAMES = {
    ("bytes and words",): "gpt-2",
    ("digits", "bytes and words"): "smollm",
    (_LLAMA3, "bytes"): "llama-bpe",
    (_QWEN2, "bytes"): "qwen2",
}
"""Steps of a pre-tokenizer -> what llama.cpp calls them."""
_LLAMA3_WITH_MERGES = "smaug-bpe"
"""Llama 3's pattern without its rule that a word of the vocabulary is not merged."""


def add_tokenizer(writer: Any, source: Path, vocab_size: int) -> list[str]:
    """Write what llama.cpp reads of a tokenizer.

    Args:
        writer: ``gguf.GGUFWriter``.
        source: folder with the tokenizer, and config.json beside it.
        vocab_size: of the model; ids above the tokenizer's are unused.

    Returns:
        Notes for the report.

    Raises:
        CheckpointError: llama.cpp, or this module, does not have such a tokenizer.
    """
    if not has_tokenizer(source):
        writer.add_tokenizer_model("none")
        return ["model.gguf has no tokenizer, as the checkpoint carries none: readers take token ids"]
    from gguf import SpecialVocab, TokenType

    try:
        tokenizer = read_tokenizer_folder(source)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # transformers and its Rust side raise whatever they like
        raise CheckpointError(
            f"the tokenizer in {source} cannot be read for GGUF ({first_line(error)}); put one with a "
            f"tokenizer.json there"
        ) from error
    merges = state["model"].get("merges")
    pre = pre_tokenizer_name(state)
    if pre is None:
        raise CheckpointError(
            f"the tokenizer in {source} ({state['model'].get('type')}) cuts text in a way that has no name "
            "in GGUF here, which are byte-level BPE as of GPT-2, SmolLM, Llama 3 and Qwen2; choose another "
            "--format"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(names) >= vocab_size:
        raise CheckpointError(
            f"the tokenizer in {source} has ids up to {max(names)}, and the model has {vocab_size} tokens; "
            f"put the model's own tokenizer there"
        )
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    tokens, types = [], []
    for number in range(vocab_size):
        tokens.append(names.get(number, f"[PAD{number}]"))
        if number not in names:
            types.append(TokenType.UNUSED)
        elif number in added:
            types.append(TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    special = SpecialVocab(source, load_merges=False, n_vocab=vocab_size)
    ids = tokenizer("a")["input_ids"]
    special.add_special_token = {
        "bos": tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id,
    }
    special.add_to_gguf(writer, quiet=True)
    kind = (state.get("normalizer") or {}).get("type")
    return [f"the tokenizer normalises text ({kind}), llama.cpp does not"] if kind is not None else []


def pre_tokenizer_name(state: dict[str, Any]) -> str | None:
    """What llama.cpp calls the way in which a tokenizer cuts text; None where it has no name here.

    Args:
        state: tokenizer.json.
    """
    model = state["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or not model.get("merges"):
        return None
    pre = state.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    name = _NAMES.get(tuple(_step(step) for step in steps))
    if name == "llama-bpe" and not model.get("ignore_merges"):
        return _LLAMA3_WITH_MERGES
    if name != "llama-bpe" and model.get("ignore_merges"):
        return None
    return name


def _step(step: dict[str, Any]) -> str:
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes and words" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex"))
    return f"{kind}, unknown"
