"""The tokens that a choice of layers reads: what is measured on, and what mixers are set on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spikingbrain_train.data.gpt_dataset import HeldOutSamples
from spikingbrain_train.data.held_out import open_held_out
from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.data.sample import Sample
from spikingbrain_train.errors import DataError
from spikingbrain_train.evaluation.held_out_windows import HeldOutWindows
from spikingbrain_train.parallel.process_groups import ProcessGroups


@dataclass(frozen=True)
class Stretch:
    """Some windows of a dataset, one behind the other."""

    prefix: str
    first: int
    """Windows in front of them."""
    count: int
    """At most: no more than there are."""


@dataclass(frozen=True)
class Text:
    """Tokens to read."""

    stretches: Sequence[Stretch]
    seq_length: int
    micro_batch_size: int
    num_sink_tokens: int
    """In front of a window, of the model that is measured; padding for the dense source."""

    def batches(self, groups: ProcessGroups, vocab_size: int) -> list[MicroBatch]:
        """This rank's micro-batches, kept in memory.

        Raises:
            DataError: the datasets are damaged, or of another vocabulary.
        """
        found: list[MicroBatch] = []
        for stretch in self.stretches:
            windows = HeldOutWindows(
                windows_of(stretch, self.seq_length, vocab_size),
                [stretch.prefix],
                groups,
                micro_batch_size=self.micro_batch_size,
                num_sink_tokens=self.num_sink_tokens,
            )
            found += windows.batches()
        return found


def stretches_of(
    measured: Sequence[str], tokens: int, calibration: Sequence[str], calibration_tokens: int, seq_length: int
) -> tuple[list[Stretch], list[Stretch]]:
    """What is measured on and what mixers are set on, which share no window.

    Of each dataset as many tokens as of the others, in whole windows from its beginning. One that is named by
    both gives its first windows to be measured on, half of its windows at most, and those behind them to set
    mixers on.

    Args:
        measured: prefixes of --data.
        tokens: at least so many of them all, where there are.
        calibration: prefixes of --calibration-data; empty where nothing is set.
        calibration_tokens: likewise.
        seq_length: tokens of a window.

    Raises:
        DataError: a dataset is damaged, or one that is named by both has a single window.
    """
    first_ones = [Stretch(prefix, 0, _wanted(tokens, seq_length, measured)) for prefix in measured]
    behind: dict[Path, int] = {}
    both = {Path(prefix).resolve() for prefix in calibration}
    for number, stretch in enumerate(first_ones):
        name = Path(stretch.prefix).resolve()
        if name not in both:
            continue
        there = len(open_held_out([stretch.prefix], seq_length))
        if there < 2:
            raise DataError(
                f"{stretch.prefix} is named by --data and by --calibration-data, and has too few tokens for "
                f"two windows of {seq_length}, one to measure on and one to set mixers on; give a shorter "
                "--seq-length, more text, or two datasets"
            )
        behind[name] = min(stretch.count, there // 2)
        first_ones[number] = Stretch(stretch.prefix, 0, behind[name])
    others = [
        Stretch(
            prefix,
            behind.get(Path(prefix).resolve(), 0),
            _wanted(calibration_tokens, seq_length, calibration),
        )
        for prefix in calibration
    ]
    return first_ones, others


def _wanted(tokens: int, seq_length: int, prefixes: Sequence[str]) -> int:
    return -(-tokens // (seq_length * len(prefixes)))


def windows_of(stretch: Stretch, seq_length: int, vocab_size: int) -> HeldOutSamples:
    """The windows of a stretch, as every evaluation cuts them.

    Raises:
        DataError: the dataset is damaged, or of another vocabulary.
    """
    upto = open_held_out([stretch.prefix], seq_length, stretch.first + stretch.count, vocab_size)
    if stretch.first == 0:
        return upto
    before = open_held_out([stretch.prefix], seq_length, stretch.first, vocab_size)
    return _Later(upto, before)


class _Later(HeldOutSamples):
    """What some windows have behind others that they begin with."""

    def __init__(self, upto: HeldOutSamples, before: HeldOutSamples) -> None:
        self._upto, self._before = upto, before
        self.seq_length = upto.seq_length
        self.num_samples = len(upto) - len(before)

    def predicted_tokens(self) -> list[int]:
        """Labels that carry loss, of each dataset."""
        pairs = zip(self._upto.predicted_tokens(), self._before.predicted_tokens(), strict=True)
        return [both - first for both, first in pairs]

    def _sample(self, index: int) -> Sample:
        return self._upto[len(self._before) + index]
