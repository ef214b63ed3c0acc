"""Texts to the ids of a tokenizer, in the fastest way here that gives the tokenizer's own ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from spikingbrain_train.data.tokenizers import PROBES, HuggingFaceTokenizer, Tokenizer
from spikingbrain_train.data.word_cache import WordCache, cuts_at_spaces
from spikingbrain_train.errors import ConfigurationError

_NO_ID = 1 << 62
"""Larger than every id."""

GIGATOKEN_MISSING = "it is not installed (pip install 'spikingbrain-train[gigatoken]')"


class TokenizerBackend(str, Enum):
    """Which library makes tokens of text."""

    auto = "auto"
    """gigatoken where it is installed, takes the tokenizer and gives the same ids; else tokenizers."""
    gigatoken = "gigatoken"
    """That one, or an error that says why not."""
    tokenizers = "tokenizers"
    """That of Hugging Face; sentencepiece for its own models."""


class Encoder(Protocol):
    """Makes ids of texts. Can be sent to worker processes."""

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, one behind the other, and how many each has."""
        ...


class PlainEncoder:
    """The tokenizer as it is."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`Encoder`."""
        encoded = self._tokenizer.encode_batch(texts)
        ids = [np.array(each, dtype=np.int64) for each in encoded]
        return np.concatenate(ids or [np.empty(0, np.int64)]), np.array([len(each) for each in encoded], int)


class GigatokenEncoder:
    """A Hugging Face tokenizer in gigatoken, one thread a process.

    gigatoken wants a piece for every byte. Some byte-level vocabularies, such as SmolLM2's, lack those of
    bytes that their corpus did not have: here they get ids behind all others, and a text in which one of
    those turns up is left to the tokenizer itself.

    Args:
        tokenizer: whose ids are to be had.

    Raises:
        ImportError: gigatoken is not here.
        RuntimeError, ValueError: gigatoken does not take the tokenizer.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        import gigatoken

        self._tokenizer = tokenizer
        content, self._end = _with_every_byte(tokenizer)
        """Ids from here on are of bytes for which the tokenizer has none."""
        self._backend: Any = gigatoken.Tokenizer.from_json(content)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`Encoder`."""
        # One by one: its batches come as awkward arrays, whose import takes longer than tokenizing megabytes.
        encoded = [self._backend.encode(text) for text in texts]
        for number, ids in enumerate(encoded):
            if len(ids) and ids.max() >= self._end:
                (own,) = self._tokenizer.encode_batch([texts[number]])
                encoded[number] = np.array(own, dtype=np.uint32)
        lengths = np.array([len(each) for each in encoded], dtype=int)
        return np.concatenate(encoded or [np.empty(0, np.uint32)]), lengths

    def __reduce__(self) -> tuple[type[GigatokenEncoder], tuple[HuggingFaceTokenizer]]:
        return GigatokenEncoder, (self._tokenizer,)


def _with_every_byte(tokenizer: HuggingFaceTokenizer) -> tuple[str, int]:
    """The tokenizer.json of a byte-level tokenizer with a piece for every byte, and the first id added to it.

    One of another kind, or that is complete, comes as it is.
    """
    content = tokenizer.parts
    if content["model"]["type"] != "BPE" or '"ByteLevel"' not in json.dumps(content["pre_tokenizer"]):
        return tokenizer.as_json(), _NO_ID
    pieces = content["model"]["vocab"]
    missing = sorted(set(ByteLevel.alphabet()) - pieces.keys())
    if not missing:
        return tokenizer.as_json(), _NO_ID
    first = max([*pieces.values(), *(token["id"] for token in content["added_tokens"])]) + 1
    pieces |= {piece: first + number for number, piece in enumerate(missing)}
    return json.dumps(content, ensure_ascii=False), first


@dataclass(frozen=True)
class ChosenEncoder:
    """What tokenizes, and why."""

    encoder: Encoder
    name: str
    """``gigatoken`` or ``tokenizers``, or ``sentencepiece``."""
    said: str
    """A sentence without its full stop."""


def choose_encoder(tokenizer: Tokenizer, backend: TokenizerBackend, sample: Sequence[str]) -> ChosenEncoder:
    """The fastest encoder of a tokenizer that gives its ids.

    Args:
        tokenizer: whose ids count.
        backend: what the user wants.
        sample: of the texts to come; every faster way is held to the tokenizer itself over them, and over
            texts on which tokenizers part.

    Raises:
        ConfigurationError: gigatoken is asked for and cannot be had; the sentence says why.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        reason = "it is used for tokenizers of Hugging Face, and this is a sentencepiece model"
        return ChosenEncoder(
            PlainEncoder(tokenizer), "sentencepiece", _without(backend, "sentencepiece", reason)
        )
    texts = [*PROBES, *(f"a{token} b{token}\n{token}" for token in tokenizer.added_tokens), *sample]
    expected = PlainEncoder(tokenizer).encode(texts)
    reason = ""
    if backend is not TokenizerBackend.tokenizers:
        found, reason = _gigatoken(tokenizer, texts, expected)
        if found is not None:
            size = sum(len(text.encode()) for text in sample) / 1e6
            said = (
                f"tokenized by gigatoken, which gave the tokenizer's ids for {len(sample):,} of the "
                f"documents ({size:.2f} MB) and for texts on which tokenizers part"
            )
            return ChosenEncoder(found, "gigatoken", said)
    said = _without(backend, "tokenizers", reason)
    if cuts_at_spaces(tokenizer):
        words = WordCache(tokenizer)
        if _same(words.encode(texts), expected):
            return ChosenEncoder(words, "tokenizers", f"{said}; ids of words are kept")
    return ChosenEncoder(PlainEncoder(tokenizer), "tokenizers", said)


def _gigatoken(
    tokenizer: HuggingFaceTokenizer, texts: Sequence[str], expected: tuple[np.ndarray, np.ndarray]
) -> tuple[GigatokenEncoder | None, str]:
    """The encoder, or why it is none."""
    try:
        encoder = GigatokenEncoder(tokenizer)
        found = encoder.encode(texts)
    except ImportError:
        return None, GIGATOKEN_MISSING
    except Exception as error:  # its Rust side raises what it likes
        return None, f"it does not take this tokenizer ({str(error).strip().splitlines()[0]})"
    if _same(found, expected):
        return encoder, ""
    ends = [np.cumsum(lengths) for _, lengths in (found, expected)]
    for number, text in enumerate(texts):
        one, other = (
            ids[end[number] - lengths[number] : end[number]]
            for (ids, lengths), end in zip((found, expected), ends, strict=True)
        )
        if not np.array_equal(one, other):
            return None, f"it gives other ids, as for a text that begins with {text[:30]!r}"
    return None, "it gives other ids"


def _same(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> bool:
    return all(np.array_equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


def _without(backend: TokenizerBackend, name: str, reason: str) -> str:
    if backend is TokenizerBackend.gigatoken:
        raise ConfigurationError(f"--tokenizer-backend gigatoken cannot be had: {reason}; leave it at auto")
    because = f"; gigatoken is not used: {reason}" if backend is TokenizerBackend.auto else ""
    return f"tokenized by {name}{because}"
