"""How whole examples are packed into sequences: best fit, the longest first. Pure Python.

Examples are never cut to fill a sequence. Best fit decreasing needs at most 11/9 of the fewest possible
sequences and 4 more (Johnson et al., SIAM Journal on Computing 3, 1974), and with many short examples among
them it leaves next to nothing empty. Only the lengths decide, so every epoch has as many sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spikingbrain_train.config.stage import LongExamples
from spikingbrain_train.errors import DataError
from spikingbrain_train.storage.loss_mask_format import read_loss_positions


@dataclass(frozen=True)
class FittingExamples:
    """Which examples of a dataset a run with sequences of some length reads."""

    lengths: list[int]
    """Inputs of each example: one less than its tokens up to the last with loss, which is only predicted,
    and at most as many as a sequence has; 0 where it is left out."""
    truncated: int
    """Examples that are cut off where the sequence ends."""
    dropped: int
    """Examples that are left out: longer ones where such are to be dropped, or without loss once cut off."""

    @property
    def read(self) -> int:
        """Examples that are not left out."""
        return len(self.lengths) - self.dropped

    @property
    def tokens(self) -> int:
        """Inputs of all of them."""
        return sum(self.lengths)


def fitting_examples(prefix: str, seq_length: int, long: LongExamples) -> FittingExamples:
    """Cut off or leave out what is longer than a sequence.

    Args:
        prefix: of a dataset with a mask of its loss.
        seq_length: tokens of a sequence.
        long: what becomes of longer examples.

    Raises:
        DataError: nothing is left, or the mask is missing or damaged.
    """
    positions = read_loss_positions(prefix)
    lengths, truncated, dropped = list(positions.last), 0, 0
    for number, length in enumerate(lengths):
        if length <= seq_length:
            continue
        if long is LongExamples.truncate and positions.first[number] <= seq_length:
            lengths[number] = seq_length
            truncated += 1
        else:
            lengths[number] = 0
            dropped += 1
    found = FittingExamples(lengths, truncated, dropped)
    if not found.read:
        raise nothing_fits(prefix, seq_length, long)
    return found


def nothing_fits(prefix: str, seq_length: int, long: LongExamples) -> DataError:
    """The error of a dataset of which no example can be read."""
    if long is LongExamples.truncate:
        return DataError(
            f"none of the examples of {prefix} has a token with loss in its first "
            f"stage.seq_length={seq_length}: raise it"
        )
    return DataError(
        f"none of the examples of {prefix} fits into stage.seq_length={seq_length}: raise it, or keep the "
        "beginnings of longer ones with stage.sft.long_examples=truncate"
    )


@dataclass(frozen=True)
class Packing:
    """Where examples of given lengths lie, whichever of equal length they are."""

    sequences: int
    order: list[tuple[int, list[int]]]
    """(length, sequence of each example of that length), the longest first."""


def pack(lengths: Iterable[int], seq_length: int) -> Packing:
    """Put examples into sequences.

    Every example goes, the longest first, into the fullest sequence that has room for it, or a new one.

    Args:
        lengths: of the examples, each 0 (left out) to ``seq_length``.
        seq_length: tokens of a sequence.
    """
    room: dict[int, list[int]] = {}  # sequences by the tokens that still fit
    rooms = 0  # bit n is set where room[n] is not empty
    sequences, order = 0, []
    for length, left in sorted(Counter(lengths).items(), reverse=True):
        if length == 0:
            continue
        placed: list[int] = []
        while left:
            if enough := rooms >> length:
                space = length + (enough & -enough).bit_length() - 1
                found = room[space]
                taken = found[-left:]
                del found[-left:]
                if not found:
                    rooms &= ~(1 << space)
            else:
                space = seq_length
                taken = list(range(sequences, sequences + -(-left // (seq_length // length))))
                sequences += len(taken)
            placed += taken
            left -= len(taken)
            if space > length:
                room.setdefault(space - length, []).extend(taken)
                rooms |= 1 << (space - length)
        order.append((length, placed))
    return Packing(sequences, order)


def fill(lengths: Sequence[int], sequences: int, seq_length: int) -> float:
    """Share of the positions in the sequences that hold tokens of examples."""
    return sum(lengths) / (sequences * seq_length) if sequences else 0.0
