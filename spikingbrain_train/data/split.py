"""Which documents are held out: those that come first in an order that depends on their texts alone.

So copies of a document stay together, and a split survives reordering, other workers and added files.
Documents are never cut.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from spikingbrain_train.errors import DataError

_PLACES = 2.0**64


def place_of(text: str, seed: int = 0) -> int:
    """Where a text lies in the order, evenly spread over 0 to 2**64 - 1; another seed is another order."""
    key = seed.to_bytes(8, "big") if seed else b""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=key).digest(), "big")


def is_among(place: int, fraction: float) -> bool:
    """Whether a document is of the first ``fraction`` of all that there could be."""
    return place < fraction * _PLACES


@dataclass(frozen=True)
class TokenSplit:
    """Documents held out for a number of tokens."""

    held_out: np.ndarray
    """[documents] bool."""
    tokens: int
    """Tokens of those."""
    edge_tokens: int
    """Tokens of the document (of its copies together) that would have come nearer if it could be cut."""


def split_by_tokens(places: np.ndarray, lengths: np.ndarray, wanted: int) -> TokenSplit:
    """Hold out the documents that come first, so many that their tokens are as near to ``wanted`` as can be.

    At least one document is left on each side, and of equally near numbers the smaller is taken, so the error
    is at most half of the document at the edge wherever ``wanted`` leaves room on both sides.

    Args:
        places: of each document [documents] uint64, see :func:`place_of`.
        lengths: tokens of each document [documents].
        wanted: tokens.

    Raises:
        DataError: all documents have one place, so that none can be held out.
    """
    order = np.argsort(places, kind="stable")
    in_order = places[order]
    tokens = np.cumsum(lengths[order], dtype=np.int64)
    ends = np.flatnonzero(in_order[1:] != in_order[:-1])  # the last copy of every document but the last one
    if len(ends) == 0:
        raise DataError(
            "there is only one document (or copies of one), and documents are held out whole: give more, or "
            "cut long text files with --max-text-chars"
        )
    sums = tokens[ends]
    best = int(np.argmin(np.abs(sums - wanted)))
    after = np.append(sums[1:], tokens[-1])
    before = np.insert(sums[:-1], 0, 0)
    edge = after[best] - sums[best] if sums[best] < wanted else sums[best] - before[best]
    return TokenSplit(places <= in_order[ends[best]], int(sums[best]), int(edge))
