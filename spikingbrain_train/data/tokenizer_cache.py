"""Tokenizers as transformers has read them, kept for the next command.

To ask transformers which class a folder's tokenizer has, and what that class makes of the files, takes
seconds, most of them for imports; what comes of it is a ``tokenizers.Tokenizer``, which loads in a moment. It
is kept under the contents of the folder's files and the versions of both libraries, so that another tokenizer
is never taken for it. Nothing but JSON is read, and a cache that cannot be used is no error.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer

_FORMAT = 1
"""Raised where what is kept changes."""
_MOST_KEPT = 16
_LARGE = 64 << 20
"""Bytes; larger files of a folder are weights."""


@dataclass(frozen=True)
class TokenizerFacts:
    """What is kept beside the ``tokenizers.Tokenizer``."""

    vocab_size: int
    """Largest token id + 1."""
    eos_id: int
    fingerprint: str
    """See :attr:`~spikingbrain_train.data.tokenizers.Tokenizer.fingerprint`."""
    encode_special_tokens: bool
    """Whether special tokens in texts are taken for plain text; no part of the library's JSON."""


def cache_folder() -> Path:
    """Where tokenizers are kept: ``spikingbrain_train/tokenizers`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "spikingbrain_train" / "tokenizers"


def cache_key(folder: Path, probes: tuple[str, ...]) -> str | None:
    """Of all that decides what transformers reads from ``folder``, and of what is computed from it.

    That is every file in it, its path (transformers knows some published folders by name), both libraries,
    and the texts whose ids make up the fingerprint. None where a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        facts = [_FORMAT, version("transformers"), version("tokenizers"), str(folder), list(probes)]
        digest.update(json.dumps(facts).encode("ascii"))
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            size = path.stat().st_size
            content = hashlib.sha256(path.read_bytes()).hexdigest() if size <= _LARGE else ""
            digest.update(json.dumps([path.name, size, content]).encode("ascii"))
    except (OSError, PackageNotFoundError):
        return None
    return digest.hexdigest()


def recall(key: str | None) -> tuple[TokenizerFacts, RustTokenizer] | None:
    """What :func:`remember` kept under ``key``; None where there is nothing whole."""
    if key is None:
        return None
    try:
        path = cache_folder() / key
        facts, backend = path.read_text(encoding="utf-8").split("\n", 1)
        known, tokenizer = TokenizerFacts(**json.loads(facts)), RustTokenizer.from_str(backend)
        with suppress(OSError):
            os.utime(path)  # the ones longest unused make room
    except Exception:  # the Rust side raises plain Exception; whatever it is, transformers is asked again
        return None
    return known, tokenizer


def remember(key: str | None, facts: TokenizerFacts, tokenizer: RustTokenizer) -> None:
    """Keep a tokenizer, in place of the one longest unused where there are many."""
    if key is None:
        return
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        # Not named after the process id: other machines may share the folder.
        descriptor, temporary = tempfile.mkstemp(prefix=".tmp-", dir=folder)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(f"{json.dumps(asdict(facts))}\n{tokenizer.to_str()}")
            os.replace(temporary, folder / key)
        except BaseException:
            os.unlink(temporary)
            raise
        kept = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in kept[_MOST_KEPT:]:
            path.unlink(missing_ok=True)
