"""Texts of many lengths as batches of few shapes: what is read once, where it is asked, and how it is padded.

Padding stands behind a text, where no token of a causal model sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class ScoreRequest(NamedTuple):
    """What is asked of a model: how likely one text is behind another."""

    context: Sequence[int]
    """Token ids, at least one."""
    continuation: Sequence[int]
    """Token ids that follow."""


@dataclass
class Row:
    """A text that is read once, however many requests ask about it."""

    tokens: tuple[int, ...]
    positions: list[int] = field(default_factory=list)
    """Whose next token is asked for."""
    targets: list[int] = field(default_factory=list)
    """The next token that is asked about, one for each position."""
    slots: list[int] = field(default_factory=list)
    """Where each answer belongs among those of all requests."""


@dataclass(frozen=True)
class BatchGroup:
    """Batches of one shape."""

    length: int
    """Tokens of a row, padding included."""
    rows: int
    """Rows of a batch; where it has fewer, rows of padding fill it up."""
    batches: list[list[Row]]
    """As many for every replica; replica r of n takes every n-th from the r-th on."""


def rows_of(requests: Sequence[ScoreRequest]) -> list[Row]:
    """Texts to read; the last token of a request is none, because nothing is asked behind it.

    The options of a multiple-choice question that are one letter each are so read with one row.
    """
    rows: dict[tuple[int, ...], Row] = {}
    slot = 0
    for context, continuation in requests:
        if not context:
            raise ValueError("a request has no context: put the token that begins texts in front")
        if not continuation:
            continue
        tokens = (*context, *continuation)[:-1]
        row = rows.setdefault(tokens, Row(tokens))
        row.positions += range(len(context) - 1, len(tokens))
        row.targets += continuation
        row.slots += range(slot, slot + len(continuation))
        slot += len(continuation)
    return list(rows.values())


def batch_groups(
    rows: Sequence[Row],
    *,
    tokens_per_batch: int,
    replicas: int = 1,
    fitting: Callable[[int], int] = lambda length: length,
    exact: bool = False,
) -> list[BatchGroup]:
    """Batches of all rows, the longest first: what does not fit memory is known at once.

    Args:
        rows: in any order.
        tokens_per_batch: a batch has no more, unless a single row has.
        replicas: that share the batches of a group evenly.
        fitting: from a number of tokens to the next that ranks can split.
        exact: no padding; else a row is padded by at most about an eighth, so that few shapes arise.
    """
    by_length: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        length = len(row.tokens) if exact else fitting(_rounded_up(len(row.tokens)))
        by_length.setdefault(length, []).append(row)
    groups = []
    for length, members in by_length.items():
        most = max(1, tokens_per_batch // length)
        batches = -(-len(members) // (most * replicas)) * replicas
        each = -(-len(members) // batches)
        filled = [members[first : first + each] for first in range(0, batches * each, each)]
        groups.append(BatchGroup(length, each, filled))
    return groups


def _rounded_up(length: int) -> int:
    step = max(1, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step
