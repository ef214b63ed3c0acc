"""What of a preprocessing is done, on disk: the same command goes on where it was killed, to the same bytes.

The tokens lie in the staged ``.bin`` files; beside them a journal tells, for every group of chunks, the
rest of what workers made of them, and how long those files are and what their checksums are. Chunks are cut
the same way at every call, so those that are done are counted and not tokenized again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from spikingbrain_train.data.documents import Source
from spikingbrain_train.data.indexed import IndexedDatasetWriter
from spikingbrain_train.data.preprocess_options import PreprocessOptions
from spikingbrain_train.data.token_file import crc32_of
from spikingbrain_train.data.tokenize_documents import TokenizedChunk
from spikingbrain_train.data.tokenizers import Tokenizer
from spikingbrain_train.storage.journal import Journal, key_of

_FILE = "progress.jsonl"
_SECONDS = 5.0
"""Between entries: what a killed call has to do again, beside what its workers had under way."""
_NO_PART = ("workers", "overwrite", "tokenizer_backend")
"""Options that decide no byte of the output."""


def key_of_work(options: PreprocessOptions, sources: Sequence[Source], tokenizer: Tokenizer) -> str:
    """Of all that decides what is written: another key is another work."""
    files = [[os.path.realpath(source.name), source.size, _changed(source.name)] for source in sources]
    chosen = {name: value for name, value in asdict(options).items() if name not in _NO_PART}
    content = json.dumps([1, chosen, files, tokenizer.fingerprint], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _changed(name: str) -> int:
    try:
        return os.stat(name).st_mtime_ns
    except OSError:  # what comes with Python
        return 0


def can_go_on(staging: Path, key: str) -> bool:
    """Whether an abandoned folder holds the beginning of the same work, with the tokens that it tells of."""
    if key_of(staging / _FILE) != key:
        return False
    kept = _kept(Journal(staging / _FILE, key))
    if not all((staging / name).is_file() for name in kept):
        return False
    return all(crc32_of(staging / name, most=size) == crc for name, (size, crc) in kept.items())


def _kept(journal: Journal) -> dict[str, tuple[int, int]]:
    """By file: bytes that are done, and their checksum."""
    last = next(reversed(journal.entries.values()), None)
    return {} if last is None else {name: (size, crc) for name, (size, crc) in last["files"].items()}


class Progress:
    """The journal of one call.

    Args:
        staging: the folder that it works in.
        key: from :func:`key_of_work`.
    """

    def __init__(self, staging: Path, key: str) -> None:
        self._journal = Journal(staging / _FILE, key)
        self._pending: list[dict[str, Any]] = []
        self._written = time.monotonic()
        self.kept = _kept(self._journal)
        """Of the staged token files, by name: bytes that are there already, and their checksum."""
        self._chunks = [each for entry in self._journal.entries.values() for each in entry["chunks"]]

    def results(self, dtype: type[np.number]) -> Iterator[TokenizedChunk]:
        """What was made of them; in the place of their tokens, which are there, stand zeros."""
        for values in self._chunks:
            loss = values.pop("loss")
            tokens = sum(values["lengths"])
            if loss is not None:
                bits = np.frombuffer(bytes.fromhex(loss), dtype=np.uint8)
                loss = np.unpackbits(bits, count=tokens).astype(bool)
            yield TokenizedChunk(token_ids=np.zeros(tokens, dtype), loss=loss, **values)
        self._chunks = []

    def add(self, result: TokenizedChunk, writers: Sequence[IndexedDatasetWriter]) -> None:
        """A chunk went to the writers; every few seconds it is written down, with those before it."""
        loss = None if result.loss is None else np.packbits(result.loss).tobytes().hex()
        values = {name: value for name, value in vars(result).items() if name != "token_ids"}
        self._pending.append({**values, "loss": loss})
        if time.monotonic() - self._written < _SECONDS:
            return
        files = dict(writer.sync() for writer in writers)
        self._journal.add(str(len(self._journal.entries)), {"chunks": self._pending, "files": files})
        self._pending, self._written = [], time.monotonic()
