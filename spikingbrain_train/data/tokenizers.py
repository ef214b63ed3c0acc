"""Text to token ids and back: Hugging Face tokenizer folders and sentencepiece models behind one protocol.

Everything is read from local files: no network, no code from a tokenizer folder. Documents are encoded
without the special tokens that a tokenizer would put around a prompt; the end-of-sequence token that
separates documents is added by whoever writes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from spikingbrain_train.data.tokenizer_cache import TokenizerFacts, cache_key, recall, remember
from spikingbrain_train.data.tokenizer_folder import (
    TOKENIZER_CONFIG_FILE,
    first_line,
    read_tokenizer_folder,
)
from spikingbrain_train.errors import DataError

PROBES = (
    "The quick brown fox, 12345 × 0.5!\n\tdef f(x):\r\n  return x  # naïve — 脑 脉冲 🧠",
    "It's what WE'LL do; they've said I'd 'don't', O'Neill",
    "0 12 345 6789 1234567 3.14159 1,000,000 1e-10 0xFF v2.0.1 ½ ² Ⅳ ٣",
    "two  three   four    spaces\ttab\t\ttabs\n\n\nlines\r\n\r\nends   \n   indented\n\n",
    " leading, and trailing ",
    "e\u0301 \u00e9 ﬁ Å \u212b ＦＵＬＬ ①",
    "中文，测试。日本語のテキスト 한국어 עברית العربية हिन्दी ไทย Ελληνικά Русский",
    "👩‍👩‍👧 🇩🇪 👍🏽 ♥️ ∑∫√ π≈3 → ⇒ \u200b\u00a0\ufeff",
    "CamelCase snake_case kebab-case UPPER https://example.org/a?b=c&d=#e a@b.de C:\\x",
    '{"key": [1, 2.5, null]}\n<p class="x">a &amp; b</p>\n$x_{i+1}^2$ **bold** `code`',
)
"""Texts on which tokenizers with equal vocabularies part: merges, normalisers, how words, digits, spaces and
lines are split."""

_HUGGING_FACE_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    TOKENIZER_CONFIG_FILE,
    "vocab.json",
    "vocab.txt",
)
_SENTENCEPIECE_FILE = "tokenizer.model"


class Tokenizer(Protocol):
    """What the project needs from a tokenizer. Instances can be pickled and sent to worker processes."""

    name: str
    """Folder or file name, for messages and sidecar files."""
    vocab_size: int
    """Largest token id + 1."""
    eos_id: int
    """Id of the end-of-sequence token, which ends every document."""
    fingerprint: str
    """Of what the tokenizer does: equal for tokenizers that give texts the same ids, see `was_made_by`."""

    @property
    def earlier_fingerprint(self) -> str:
        """The same in the form that earlier versions wrote."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with no special tokens around them."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of every text, faster than one by one."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens included."""
        ...


class HuggingFaceTokenizer:
    """A tokenizer folder as ``transformers`` saves it, run by the Rust library ``tokenizers``.

    ``transformers.AutoTokenizer`` chooses the class and reads the folder, because a tokenizer class may
    rebuild parts of its pipeline on loading; only its Rust backend is kept, so that worker processes, and the
    next commands (:mod:`~spikingbrain_train.data.tokenizer_cache`), start without importing ``transformers``.

    Args:
        folder: folder with tokenizer.json (or files that convert to it) and tokenizer_config.json.

    Raises:
        DataError: nothing loadable, only a Python ("slow") tokenizer, or no end-of-sequence token.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        key = cache_key(self.folder, PROBES)
        known = recall(key)
        facts, backend = known or self._read_folder()
        self._backend: Any = backend
        self._backend.encode_special_tokens = facts.encode_special_tokens
        self.vocab_size, self.eos_id, self.fingerprint = facts.vocab_size, facts.eos_id, facts.fingerprint
        if known is None:
            remember(key, facts, self._backend)

    def _read_folder(self) -> tuple[TokenizerFacts, Any]:
        try:
            loaded = read_tokenizer_folder(self.folder)
        except Exception as error:  # the Rust side raises plain Exception
            raise DataError(
                f"{self.folder} holds no tokenizer that transformers can load ({first_line(error)}): give a "
                "folder with tokenizer.json and tokenizer_config.json, or a sentencepiece .model file"
            ) from error
        if not getattr(loaded, "is_fast", False):
            raise DataError(
                f"the tokenizer in {self.folder} exists only in Python ({type(loaded).__name__}): give a "
                "folder with a tokenizer.json, or the sentencepiece .model file itself"
            )
        if loaded.eos_token_id is None:
            raise DataError(
                f"the tokenizer in {self.folder} names no end-of-sequence token: set eos_token in its "
                "tokenizer_config.json"
            )
        backend, eos_id = loaded.backend_tokenizer, int(loaded.eos_token_id)
        # A folder may store the truncation and padding of its last use; documents are never cut.
        backend.no_truncation()
        backend.no_padding()
        own = backend.get_vocab(with_added_tokens=False)
        facts = TokenizerFacts(
            vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
            eos_id=eos_id,
            fingerprint=_fingerprint(own, _encode_batch(backend, PROBES), eos_id),
            encode_special_tokens=backend.encode_special_tokens,
        )
        return facts, backend

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "encode_special_tokens": self._backend.encode_special_tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The library's own pickle forgets it.
        encode_special_tokens = state.pop("encode_special_tokens")
        vars(self).update(state)
        self._backend.encode_special_tokens = encode_special_tokens

    def as_json(self) -> str:
        """The tokenizer as tokenizer.json holds it."""
        return self._backend.to_str()

    @property
    def parts(self) -> dict[str, Any]:
        """What tokenizer.json says of normalizer, pre_tokenizer, model and added_tokens."""
        return json.loads(self.as_json())

    @property
    def added_tokens(self) -> list[str]:
        """What is found in texts before they are split into words."""
        return [token.content for token in self._backend.get_added_tokens_decoder().values()]

    @property
    def earlier_fingerprint(self) -> str:
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        return _earlier_fingerprint(vocabulary, self.encode(PROBES[0]), self.eos_id)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return _encode_batch(self._backend, texts)

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)


class SentencePieceTokenizer:
    """A sentencepiece ``.model`` file.

    Args:
        path: the .model file.

    Raises:
        DataError: not a sentencepiece model, or one trained without an end-of-sequence piece.
    """

    def __init__(self, path: str | Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.path = Path(path)
        self.name = self.path.name
        try:
            self._processor: Any = SentencePieceProcessor(model_proto=self.path.read_bytes())
            self.vocab_size = int(self._processor.vocab_size())
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.path} is not a readable sentencepiece model ({first_line(error)}): give the .model "
                "file that sentencepiece wrote, or a Hugging Face tokenizer folder"
            ) from error
        self.eos_id = int(self._processor.eos_id())
        if self.vocab_size == 0 or self.eos_id < 0:
            raise DataError(
                f"the sentencepiece model {self.path} has no end-of-sequence piece: train it with eos_id >= 0"
            )
        self.fingerprint = _fingerprint(self._pieces(), self.encode_batch(PROBES), self.eos_id)

    def _pieces(self) -> dict[str, int]:
        return {self._processor.id_to_piece(index): index for index in range(self.vocab_size)}

    @property
    def earlier_fingerprint(self) -> str:
        return _earlier_fingerprint(self._pieces(), self.encode(PROBES[0]), self.eos_id)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # One thread: preprocessing already runs one process per core.
        return self._processor.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(index) for index in ids])


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer at ``path``.

    That is a Hugging Face folder, a sentencepiece ``.model`` file, or a folder whose only tokenizer file is a
    sentencepiece ``tokenizer.model``.

    Raises:
        DataError: missing or invalid; the sentence says what was expected.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix == ".model":
            return SentencePieceTokenizer(path)
        raise DataError(
            f"{path} is not a tokenizer: give the folder that holds tokenizer.json, or a sentencepiece "
            ".model file"
        )
    if not path.is_dir():
        raise DataError(
            f"there is no tokenizer at {path}: give a local Hugging Face tokenizer folder or a sentencepiece "
            ".model file"
        )
    found = tokenizer_files(path)
    if not found:
        raise DataError(
            f"the folder {path} holds no tokenizer files: give a folder with tokenizer.json and "
            "tokenizer_config.json, or a sentencepiece .model file"
        )
    if found == [_SENTENCEPIECE_FILE]:
        return SentencePieceTokenizer(path / _SENTENCEPIECE_FILE)
    return HuggingFaceTokenizer(path)


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the files in ``folder`` that can be of a tokenizer.

    Without any, transformers makes up a tokenizer of the model's class that knows no word.
    """
    return [name for name in _HUGGING_FACE_FILES if (folder / name).is_file()]


def was_made_by(fingerprint: str, tokenizer: Tokenizer) -> bool:
    """Whether ``fingerprint`` is that of ``tokenizer``, also in the form that earlier versions wrote."""
    return fingerprint == tokenizer.fingerprint or fingerprint == tokenizer.earlier_fingerprint


def _encode_batch(backend: Any, texts: Sequence[str]) -> list[list[int]]:
    return [item.ids for item in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _fingerprint(vocabulary: Mapping[str, int], probe_ids: Sequence[Sequence[int]], eos_id: int) -> str:
    """SHA-256 over what the tokenizer does to texts, not over how a library serialises it.

    Tokens that a tokenizer class adds on loading are left out of ``vocabulary``: texts do not contain them.
    """
    return "ids-" + _digest([_pieces(vocabulary), [list(ids) for ids in probe_ids], eos_id])


def _earlier_fingerprint(vocabulary: Mapping[str, int], probe_ids: Sequence[int], eos_id: int) -> str:
    """What sidecars of datasets hold that were made before there were several probes."""
    return _digest([_pieces(vocabulary), list(probe_ids), eos_id])


def _pieces(vocabulary: Mapping[str, int]) -> list[list[Any]]:
    return [list(piece) for piece in sorted((index, token) for token, index in vocabulary.items())]


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(
        json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    ).hexdigest()
