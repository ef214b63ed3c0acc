"""Which tokens of a dataset of examples carry loss, on disk: ``<prefix>.loss_mask``.

A token carries loss where the model learns to predict it. The format is in
:mod:`~spikingbrain_train.storage.loss_mask_format`.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spikingbrain_train.config.run_record import tokens_digest
from spikingbrain_train.data.token_file import TokenFile
from spikingbrain_train.errors import DataError
from spikingbrain_train.storage.loss_mask_format import (
    LOSS_MASK_SUFFIX,
    LossMaskHeader,
    damaged_bits,
    no_loss_mask,
    not_of_these_tokens,
    read_loss_mask_header,
)

_BLOCK = 1 << 22
"""Tokens, a multiple of 8, that are packed or looked at together."""


class LossMaskWriter:
    """Collects the mask of a dataset that is being written, and makes the file of it in the end.

    Until then a byte a token lies in the staging folder.

    Args:
        staged: path of the staged dataset without suffix.
    """

    def __init__(self, staged: str) -> None:
        self._staged = staged
        self._bytes: Any = open(f"{staged}.loss_bytes", "wb")  # noqa: SIM115  (closed by finish or close)
        self._first, self._last = array("i"), array("i")
        self._loss_tokens = self._tokens = 0

    def add(self, loss: np.ndarray, lengths: np.ndarray) -> None:
        """Append the masks of examples.

        Args:
            loss: bool, one example behind the other; each has a token with loss, and not its first one.
            lengths: tokens of each [examples].
        """
        self._bytes.write(np.ascontiguousarray(loss, dtype=np.uint8).data)
        ends = np.cumsum(lengths)
        positions = np.flatnonzero(loss)
        low, high = (np.searchsorted(positions, bound) for bound in (ends - lengths, ends))
        assert (low < high).all(), "an example without loss"
        starts = ends - lengths
        self._first.frombytes((positions[low] - starts).astype(np.int32).tobytes())
        self._last.frombytes((positions[high - 1] - starts).astype(np.int32).tobytes())
        self._loss_tokens += len(positions)
        self._tokens += len(loss)

    def take_bytes(self) -> str:
        """Close the file of bytes instead of :meth:`finish`, and return its path."""
        self._bytes.close()
        return self._bytes.name

    def finish(self) -> None:
        """Write the mask beside the staged dataset, whose index and tokens are complete."""
        self._bytes.close()
        digest = hashlib.sha256()
        for block in self._content():
            digest.update(block)
        header = LossMaskHeader(
            examples=len(self._first),
            tokens=self._tokens,
            loss_tokens=self._loss_tokens,
            tokens_digest=tokens_digest(self._staged),
            sha256=digest.digest(),
        )
        with open(self._staged + LOSS_MASK_SUFFIX, "wb") as file:
            file.write(header.pack())
            for block in self._content():
                file.write(block)
        os.remove(self._bytes.name)

    def _content(self) -> Iterator[bytes]:
        yield self._first.tobytes()
        yield self._last.tobytes()
        with open(self._bytes.name, "rb") as file:
            while len(loss := np.fromfile(file, dtype=np.uint8, count=_BLOCK)):
                yield np.packbits(loss).tobytes()

    def close(self) -> None:
        """Let go of the file of bytes after a failure."""
        self._bytes.close()


class LossMask:
    """The mask of an indexed dataset, checked when it is opened, and kept in memory: a bit a token.

    Args:
        dataset: the tokens that it must belong to.

    Raises:
        DataError: there is none, it is damaged, or it belongs to other tokens.
    """

    def __init__(self, dataset: TokenFile) -> None:
        prefix = dataset.prefix
        path = prefix + LOSS_MASK_SUFFIX
        try:
            with open(path, "rb") as file:
                header = read_loss_mask_header(file, prefix)
                content = file.read()
        except FileNotFoundError as error:
            raise no_loss_mask(prefix) from error
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        if hashlib.sha256(content).digest() != header.sha256:
            raise damaged_bits(prefix)
        if (header.tokens, header.tokens_digest) != (dataset.num_tokens, tokens_digest(prefix)):
            raise not_of_these_tokens(prefix)
        self.num_tokens, self.loss_tokens = header.tokens, header.loss_tokens
        self.first, self.last = np.frombuffer(content, np.int32, 2 * header.examples).reshape(2, -1)
        """Positions of the first and the last token with loss in each example [examples] int32."""
        self._bits = np.frombuffer(content, np.uint8, offset=8 * header.examples)

    def read(self, start: int, count: int) -> np.ndarray:
        """Whether the tokens [count] bool from position ``start`` on carry loss."""
        bits = np.unpackbits(self._bits[start // 8 : -(-(start + count) // 8)])
        return bits[start % 8 :][:count].astype(bool)

    def turns(self) -> int:
        """Stretches of tokens with loss: the answers that are learnt."""
        begun, before = 0, False
        for start in range(0, self.num_tokens, _BLOCK):
            loss = self.read(start, min(_BLOCK, self.num_tokens - start))
            begun += int(loss[0] and not before) + int((loss[1:] & ~loss[:-1]).sum())
            before = bool(loss[-1])
        return begun


def open_loss_mask(prefix: str | Path) -> LossMask:
    """The mask of the dataset at ``prefix``. Raises DataError."""
    return LossMask(TokenFile(str(prefix)))
