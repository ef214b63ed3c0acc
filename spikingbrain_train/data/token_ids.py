"""Every token of a dataset lies in the model's vocabulary: looked at once per file, and remembered.

A token beyond it has no row in the embedding. One process would stop with an IndexError somewhere in the run,
tensor-parallel ranks would take each other's rows or padding and train to a finite loss.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spikingbrain_train.data.token_file import TokenFile, document_at
from spikingbrain_train.errors import DataError

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


_MOST = int(np.iinfo(np.int64).max)
NOTHING = IdRange(_MOST, -_MOST)
"""Of no tokens at all, as a rank has where there are fewer tokens than ranks. Both numbers and their
negatives are of int64."""

_known: dict[str, IdRange] = {}
"""By :func:`_identity`; for data whose check can be remembered nowhere else."""


class Reader:
    """Who looks at a file: this process alone.

    In a distributed run the ranks are one reader together, see
    :mod:`~spikingbrain_train.training.data_check`.
    """

    rank = 0
    world_size = 1
    folder: Path | None = None
    """The run's own folder, for what cannot be remembered beside the data."""

    def least(self, numbers: list[int]) -> list[int]:
        """The smallest of each number, all of int64, over all ranks."""
        return numbers

    def progress(self, dataset: TokenFile, size: int) -> AbstractContextManager[Callable[[int], Any]]:
        """What is told of the bytes, ``size`` in all, that this rank has looked at since the last call."""
        return nullcontext(lambda looked_at: None)

    def require(self, everywhere: int, prefix: str, failure: DataError | None) -> None:
        """Raise ``failure`` on its rank, and on the others too, unless all is well everywhere."""
        if not everywhere:
            raise failure or DataError(f"another rank cannot read the dataset {prefix}; see what it says")


def check_token_ids(dataset: TokenFile, vocab_size: int, reader: Reader | None = None) -> None:
    """Every token is at least 0 and below ``vocab_size``.

    The file is read once, in parts; what was found is remembered beside it, for its size and time of change.

    Args:
        dataset: the tokens.
        vocab_size: ids that the model has embeddings for, without rows of padding.
        reader: this process alone where it is None; else a collective of all its ranks.

    Raises:
        DataError: names file, document and token of the first that is not, or the file cannot be read.
    """
    reader = reader or Reader()
    ids = recall(dataset, reader.folder)
    known, fit = reader.least([int(ids is not None), int(ids is not None and fits(ids, vocab_size))])
    if fit and ids is not None:
        remember(dataset, ids, write=False)
        return
    # Once the range is known, only the position of the first token beyond the vocabulary is to be found.
    found = _look(dataset, vocab_size, reader, find_first=bool(known))
    if not known or found.first_outside is None:
        remember(dataset, found, reader.folder, write=reader.rank == 0)
    require_fit(dataset, found, vocab_size)


def _look(dataset: TokenFile, vocab_size: int, reader: Reader, *, find_first: bool) -> IdRange:
    """:func:`scan` of the whole file, of which every rank reads its share."""
    first, end = (dataset.num_tokens * rank // reader.world_size for rank in (reader.rank, reader.rank + 1))
    share, failure = NOTHING, None
    try:
        with reader.progress(dataset, (end - first) * dataset.dtype.itemsize) as advance:
            share = scan(dataset, vocab_size, first, end, advance, find_first=find_first)
    except DataError as error:
        failure = error
    beyond = dataset.num_tokens
    outside = beyond if share.first_outside is None else share.first_outside
    read, smallest, largest, outside = reader.least(
        [int(failure is None), share.smallest, -share.largest, outside]
    )
    reader.require(read, dataset.prefix, failure)
    return IdRange(smallest, -largest, None if outside == beyond else outside)


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
    *,
    find_first: bool = False,
) -> IdRange:
    """Look at the tokens from position ``first`` up to below ``end``.

    Args:
        dataset: the tokens.
        vocab_size: of the model.
        first: where to begin.
        end: where to stop.
        advance: called with the number of bytes that were looked at since the last call.
        find_first: stop at the first token beyond the vocabulary; the range is then that of what was read.
    """
    smallest, largest, first_outside = NOTHING.smallest, NOTHING.largest, None
    for start in range(first, end, _CHUNK_TOKENS):
        tokens = dataset.read(start, min(_CHUNK_TOKENS, end - start))
        low, high = int(tokens.min()), int(tokens.max())
        if first_outside is None and (low < 0 or high >= vocab_size):
            first_outside = start + int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
        smallest, largest = min(smallest, low), max(largest, high)
        advance(tokens.nbytes)
        if find_first and first_outside is not None:
            break
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
    """Keep what was found, in this process and, if ``write``, on disk.

    That is beside the file or, where nothing may be written there, in ``folder``.
    """
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
    """Name, size and time of change of the file that holds the tokens, and their type, as the index says.

    ``anywhere`` takes its whole path, which a note beside it must not depend on.
    """
    path = os.path.realpath(dataset.bin_path)
    status = os.stat(path)
    name = path if anywhere else Path(dataset.bin_path).name
    return f"{name} {status.st_size} {status.st_mtime_ns} {dataset.dtype.name}"


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not named after the process id alone: ids repeat between containers that share a disk.
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
        temporary = folder / path.name
        try:
            temporary.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return False
    return True
