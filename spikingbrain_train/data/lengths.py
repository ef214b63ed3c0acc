"""How long the documents of a dataset are, in tokens with the one that ends them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from spikingbrain_train.data.indexed import read_info
from spikingbrain_train.data.token_file import document_lengths

_MOST_ROWS = 14
_BAR = 40


@dataclass(frozen=True)
class LengthSummary:
    """Lengths of documents in a few numbers."""

    documents: int
    tokens: int
    min: int
    median: int
    """Half of the documents are at most that long: the length of one of them."""
    mean: float
    p99: int
    """99 % of the documents are at most that long."""
    max: int


def summarize(lengths: np.ndarray) -> LengthSummary:
    """Summarize lengths [documents] of whole numbers; all are 0 where there are no documents."""
    if len(lengths) == 0:
        return LengthSummary(0, 0, 0, 0, 0.0, 0, 0)
    median, p99 = (int(length) for length in np.percentile(lengths, [50, 99], method="inverted_cdf"))
    tokens = int(lengths.sum(dtype=np.int64))
    return LengthSummary(
        len(lengths), tokens, int(lengths.min()), median, tokens / len(lengths), p99, int(lengths.max())
    )


@dataclass(frozen=True)
class DatasetDescription:
    """An indexed dataset as it can be told from its index and its sidecar."""

    prefix: str
    lengths: np.ndarray
    """Tokens of each document [documents]."""
    summary: LengthSummary
    dtype: str
    """NumPy type of a stored token."""
    bytes_per_token: float | None
    """UTF-8 bytes of the texts; None where there is no sidecar to know them from."""
    tokenizer: str | None
    """The same of the tokenizer's name."""

    def as_values(self) -> dict[str, Any]:
        """Everything but the single lengths, as JSON takes it."""
        return {
            "prefix": self.prefix,
            **asdict(self.summary),
            "dtype": self.dtype,
            "bytes_per_token": self.bytes_per_token,
            "tokenizer": self.tokenizer,
        }


def describe_dataset(prefix: str | os.PathLike[str]) -> DatasetDescription:
    """Read what ``<prefix>.idx`` and ``<prefix>.json`` say.

    Raises:
        DataError: missing, truncated or contradictory files.
    """
    prefix = os.fspath(prefix)
    dtype, lengths = document_lengths(prefix)
    info, summary = read_info(prefix), summarize(lengths)
    per_token = None if info is None or summary.tokens == 0 else info.text_bytes / summary.tokens
    name = None if info is None else info.tokenizer
    return DatasetDescription(prefix, lengths, summary, dtype.name, per_token, name)


def length_bins(longest: int, most: int = _MOST_ROWS) -> np.ndarray:
    """Bounds of bins, powers of two from 1 to beyond ``longest``, or of 4, 8 ... where those are too many."""
    powers = max(longest, 1).bit_length()
    step = -(-powers // most)
    return 2 ** np.arange(0, powers + step, step, dtype=np.int64)


def text_histogram(descriptions: Sequence[DatasetDescription]) -> list[str]:
    """Lines with a bar for every range of lengths: documents of it, and the share of tokens they have."""
    longest = max((each.summary.max for each in descriptions), default=0)
    bounds, lines = length_bins(longest), []
    for each in descriptions:
        if each.summary.tokens == 0:
            continue
        counts, tokens = counted(each.lengths, bounds)
        filled = np.flatnonzero(counts)
        lines += ["", f"{each.prefix}: documents by their tokens"]
        ranges = [f"{low:,} - {high - 1:,}" for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
        width, most = max(map(len, ranges)), counts.max()
        for row in range(filled[0], filled[-1] + 1):
            bar = "#" * int(np.ceil(_BAR * counts[row] / most))
            share = tokens[row] / each.summary.tokens
            lines.append(
                f"{ranges[row]:>{width}}  {bar:<{_BAR}} {counts[row]:>9,}   {share:>6.1%} of the tokens"
            )
    return lines


def counted(lengths: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Documents and tokens of each bin, int64 both, [bounds - 1]; empty documents are in none."""
    number = np.searchsorted(bounds, lengths, side="right") - 1
    inside = (number >= 0) & (number < len(bounds) - 1)
    size = len(bounds) - 1
    documents = np.bincount(number[inside], minlength=size)
    tokens = np.bincount(number[inside], weights=lengths[inside], minlength=size)
    return documents.astype(np.int64), tokens.astype(np.int64)
