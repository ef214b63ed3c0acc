"""Ids of words that were seen before, for tokenizers whose words never reach across a space.

The library pre-tokenizes and merges every word of every document anew, though most text is few words. Texts
are cut before each single space between two other characters; no token of the tokenizers below holds a space
behind another character, so the pieces have the ids that they have in the text. A word that is new is cut
again, where letters or digits end: addresses, dotted names and calls are many, their parts are few.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from spikingbrain_train.data.tokenizers import HuggingFaceTokenizer

_CUT = re.compile(r"(?<=\S)(?= \S)")
_PART = re.compile(r"[^A-Za-z0-9]*(?:[A-Za-z]+|[0-9]+)|[^A-Za-z0-9]+")
"""Of a word of ASCII; every pattern below ends a token where letters or digits end."""
_MOST_CHARACTERS = 1 << 26
"""Of words that are kept; the cache begins anew beyond."""
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD"}
"""They change nothing across a space, which no mark joins."""
# Each matches a space as the first character of a token, or among nothing but white space.
_PATTERNS = {
    # GPT-2, and ByteLevel(use_regex=True)
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Llama 3, cl100k
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen 2, 2.5 and 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


class WordCache:
    """Ids by word. An :class:`~spikingbrain_train.data.encoders.Encoder`.

    Args:
        tokenizer: one that :func:`cuts_at_spaces`.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, bytes] = {}
        added = map(re.escape, tokenizer.added_tokens)
        self._added_tokens = re.compile("|".join(added) or r"(?!)")
        self._characters = 0

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, one behind the other, and how many each has."""
        words = [_CUT.split(text) for text in texts]
        new = set(chain.from_iterable(words)).difference(self._known)
        self._learn(new)
        known = self._known
        encoded = [b"".join(map(known.__getitem__, each)) for each in words]
        self._characters += sum(map(len, new))
        if self._characters > _MOST_CHARACTERS:
            self._known, self._characters = {}, 0
        lengths = np.array([len(each) for each in encoded], dtype=int) // 4
        return np.frombuffer(b"".join(encoded), dtype=np.int32), lengths

    def _learn(self, words: set[str]) -> None:
        """Keep the ids of new words, and of the parts that they are cut into."""
        known, has_added_token = self._known, self._added_tokens.search
        parts = {
            # Beyond ASCII a mark may belong to the letter before it. Added tokens stay whole.
            word: _PART.findall(word) if word.isascii() and not has_added_token(word) else [word]
            for word in words
        }
        new = list(set(chain.from_iterable(parts.values())).difference(known))
        ids = self._tokenizer.encode_batch(new)
        known.update(
            (part, np.array(each, dtype=np.int32).tobytes()) for part, each in zip(new, ids, strict=True)
        )
        known.update((word, b"".join(map(known.__getitem__, each))) for word, each in parts.items())

    def __reduce__(self) -> tuple[type[WordCache], tuple[HuggingFaceTokenizer]]:
        return WordCache, (self._tokenizer,)


def cuts_at_spaces(tokenizer: HuggingFaceTokenizer) -> bool:
    """Whether the ids of a text are those of its pieces, cut before single spaces between other characters.

    Known of some ways to split text; False for all others.
    """
    parts = tokenizer.parts
    normalizer, splitter = parts["normalizer"], parts["pre_tokenizer"]
    if normalizer is not None and normalizer["type"] not in _NORMALIZERS:
        return False
    if parts["model"].get("dropout") or splitter is None:
        return False
    steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    return (
        all(_is_known(step) for step in steps)
        and any(_is_cutting(step) for step in steps)
        and all(_is_plain(token) for token in parts["added_tokens"])
    )


def _is_known(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"]
    return step["type"] == "Digits" or _is_cutting(step)


def _is_cutting(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return bool(step.get("use_regex", True))
    if step["type"] != "Split" or step["pattern"].get("Regex") not in _PATTERNS:
        return False
    return (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))


def _is_plain(token: dict[str, Any]) -> bool:
    """Whether an added token is found by its own characters alone, none of which is a space."""
    looks_beside = token["single_word"] or token["lstrip"] or token["rstrip"]
    return not looks_beside and not re.search(r"\s", token["content"])
