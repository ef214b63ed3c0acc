"""Every token of a dataset lies in the model's vocabulary: looked at once per file, and remembered.

A token beyond it has no row in the embedding. One process would stop with an IndexError somewhere in the run,
tensor-parallel ranks would take each other's rows or padding and train to a finite loss.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spikingbrain_train.config.errors import DataError
from spikingbrain_train.data.token_file import TokenFile, document_at

_CHUNK_TOKENS = 1 << 22
_MEMORY_SUFFIX = ".checked"
_MEMORY_FILE = "checked_data.json"
"""In a run's own folder, for data that lies where nothing may be written."""


@dataclass(frozen=True)
class IdRange:
    """What the tokens of a file, or of a part of it, are."""

    smallest: int
    largest: int
    first_outside: int | None = None
    """Position of the first token beyond the vocabulary; None where there is none."""


_known: dict[str, IdRange] = {}
"""By :func:`_identity`; for data whose check can be remembered nowhere else."""


def check_token_ids(dataset: TokenFile, vocab_size: int) -> None:
    """Every token is at least 0 and below ``vocab_size``.

    The file is read once, in parts; what was found is remembered beside it, for its size and time of change.

    Raises:
        DataError: names file, document and token of the first that is not, or the file cannot be read.
    """
    ids = recall(dataset)
    if ids is None:
        ids = scan(dataset, vocab_size, 0, dataset.num_tokens)
        remember(dataset, ids)
    elif not fits(ids, vocab_size):
        ids = scan(dataset, vocab_size, 0, dataset.num_tokens)
    require_fit(dataset, ids, vocab_size)


def fits(ids: IdRange, vocab_size: int) -> bool:
    """Whether all ids are of the vocabulary."""
    return ids.smallest >= 0 and ids.largest < vocab_size


def require_fit(dataset: TokenFile, ids: IdRange, vocab_size: int) -> None:
    """Raise DataError for the first token beyond the vocabulary, if there is one."""
    if ids.first_outside is None:
        return
    token = int(dataset.read(ids.first_outside, 1)[0])
    document = document_at(dataset, ids.first_outside)
    raise DataError(
        f"{dataset.bin_path}: document {document} (counted from 0) holds the token id {token}, but the "
        f"model's vocabulary has {vocab_size} ids, 0 to {vocab_size - 1}: preprocess with the tokenizer that "
        "belongs to the model"
    )


def scan(
    dataset: TokenFile,
    vocab_size: int,
    first: int,
    end: int,
    advance: Callable[[int], Any] = lambda size: None,
) -> IdRange:
    """Look at the tokens from position ``first`` up to below ``end``.

    Args:
        dataset: the tokens.
        vocab_size: of the model.
        first: where to begin.
        end: where to stop.
        advance: called with the number of bytes that were looked at since the last call.
    """
    smallest, largest, first_outside = np.iinfo(np.int64).max, np.iinfo(np.int64).min, None
    for start in range(first, end, _CHUNK_TOKENS):
        tokens = dataset.read(start, min(_CHUNK_TOKENS, end - start))
        low, high = int(tokens.min()), int(tokens.max())
        if first_outside is None and (low < 0 or high >= vocab_size):
            first_outside = start + int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
        smallest, largest = min(smallest, low), max(largest, high)
        advance(tokens.nbytes)
    return IdRange(smallest, largest, first_outside)


def recall(dataset: TokenFile, folder: Path | None = None) -> IdRange | None:
    """What an earlier check found in exactly this file; None where there was none.

    Args:
        dataset: the tokens.
        folder: the run's own folder, where :func:`remember` may have written.
    """
    anywhere = _identity(dataset, anywhere=True)
    ids = _known.get(anywhere) or _read(_beside(dataset), _identity(dataset))
    if ids is None and folder is not None:
        ids = _read(folder / _MEMORY_FILE, anywhere)
    return ids


def remember(dataset: TokenFile, ids: IdRange, folder: Path | None = None, *, write: bool = True) -> None:
    """Keep what was found, in this process and, if ``write``, beside the file or, where nothing may be
    written there, in ``folder``."""
    _known[_identity(dataset, anywhere=True)] = IdRange(ids.smallest, ids.largest)
    if not write:
        return
    found = {"smallest": ids.smallest, "largest": ids.largest}
    if not _write(_beside(dataset), {_identity(dataset): found}) and folder is not None:
        path = folder / _MEMORY_FILE
        _write(path, _entries(path) | {_identity(dataset, anywhere=True): found})


def _beside(dataset: TokenFile) -> Path:
    return Path(f"{dataset.prefix}{_MEMORY_SUFFIX}")


def _identity(dataset: TokenFile, *, anywhere: bool = False) -> str:
    """Name, size and time of change of the file that holds the tokens; ``anywhere`` takes its whole path,
    which a note beside it must not depend on."""
    path = os.path.realpath(dataset.bin_path)
    status = os.stat(path)
    return f"{path if anywhere else Path(dataset.bin_path).name} {status.st_size} {status.st_mtime_ns}"


def _entries(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _read(path: Path, identity: str) -> IdRange | None:
    found = _entries(path).get(identity)
    if not isinstance(found, dict):
        return None
    smallest, largest = found.get("smallest"), found.get("largest")
    return IdRange(smallest, largest) if type(smallest) is int and type(largest) is int else None


def _write(path: Path, entries: dict[str, Any]) -> bool:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError:
        return False
    return True
