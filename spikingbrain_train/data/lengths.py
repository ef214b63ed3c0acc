"""How long the documents of a dataset are, in tokens with the one that ends them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from spikingbrain_train.data.indexed import read_info
from spikingbrain_train.data.loss_mask import open_loss_mask
from spikingbrain_train.data.token_file import document_lengths
from spikingbrain_train.storage.loss_mask_format import has_loss_mask

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
class AnswerSummary:
    """What carries loss in a dataset of examples."""

    loss_tokens: int
    turns: int
    """Answers, each a stretch of tokens with loss."""
    longer: int | None
    """Examples whose last token with loss lies beyond a sequence; None where no length was given."""
    without_loss: int | None
    """How many of those have no loss within it, so that training leaves them out."""


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
    answers: AnswerSummary | None = None
    """None where every token carries loss."""

    def as_values(self) -> dict[str, Any]:
        """Everything but the single lengths, as JSON takes it."""
        return {
            "prefix": self.prefix,
            **asdict(self.summary),
            "dtype": self.dtype,
            "bytes_per_token": self.bytes_per_token,
            "tokenizer": self.tokenizer,
            "answers": None if self.answers is None else asdict(self.answers),
        }


def describe_dataset(prefix: str | os.PathLike[str], seq_length: int | None = None) -> DatasetDescription:
    """Read what ``<prefix>.idx``, ``<prefix>.json`` and, of examples, ``<prefix>.loss_mask`` say.

    Args:
        prefix: path without suffix.
        seq_length: tokens of a training sequence, to count the examples that are longer; None for none.

    Raises:
        DataError: missing, truncated or contradictory files.
    """
    prefix = os.fspath(prefix)
    dtype, lengths = document_lengths(prefix)
    info, summary = read_info(prefix), summarize(lengths)
    per_token = None if info is None or summary.tokens == 0 else info.text_bytes / summary.tokens
    name = None if info is None else info.tokenizer
    answers = _summarize_answers(prefix, seq_length) if has_loss_mask(prefix) else None
    return DatasetDescription(prefix, lengths, summary, dtype.name, per_token, name, answers)


def _summarize_answers(prefix: str, seq_length: int | None) -> AnswerSummary:
    mask = open_loss_mask(prefix)
    longer = without = None
    if seq_length is not None:
        longer, without = (int((each > seq_length).sum()) for each in (mask.last, mask.first))
    return AnswerSummary(mask.loss_tokens, mask.turns(), longer, without)


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
