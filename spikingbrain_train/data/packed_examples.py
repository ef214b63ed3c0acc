"""Examples of conversations packed into sequences: a pure function of (seed, sequence number).

Whole examples lie side by side in a sequence, each a document of its own to attention, recurrence and
positions, and each without what nothing is learnt from behind its last token with loss. What is left of a
sequence is padding without loss, which is a document too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from spikingbrain_train.config.run import DataConfig
from spikingbrain_train.config.stage import LongExamples
from spikingbrain_train.data.gpt_dataset import HeldOutSamples, Sample, TrainDataset
from spikingbrain_train.data.indexed import check_same_tokenizer, open_indexed_dataset
from spikingbrain_train.data.loss_mask import LossMask
from spikingbrain_train.data.token_file import document_starts
from spikingbrain_train.data.tokenizers import Tokenizer
from spikingbrain_train.planning.example_packing import fill, fitting_examples, pack
from spikingbrain_train.planning.file_checks import check_train

logger = logging.getLogger(__name__)


class PackedExamples:
    """One dataset of examples, as sequences.

    Args:
        prefix: path without suffix.
        seq_length: tokens of a sequence.
        long: what becomes of longer examples.
        seed: (run seed, number of the dataset in the blend) of training, where every epoch has an order of
            its own and other examples of equal length side by side; None takes the same order every time.
        vocab_size: the model's vocabulary; None skips that check.
        alone: give every example a sequence of its own, for models that cannot keep several apart.

    Raises:
        DataError: missing or damaged files, no loss mask, or no example of which something can be learnt.
    """

    def __init__(
        self,
        prefix: str,
        seq_length: int,
        long: LongExamples,
        seed: tuple[int, int] | None = None,
        vocab_size: int | None = None,
        *,
        alone: bool = False,
    ) -> None:
        self._tokens = open_indexed_dataset(prefix, vocab_size)
        self._loss = LossMask(self._tokens)
        self._starts = document_starts(self._tokens)
        self.prefix, self.seq_length, self.seed = prefix, seq_length, seed
        self.fitting = fitting_examples(prefix, seq_length, long)
        self._lengths = np.asarray(self.fitting.lengths, dtype=np.int64)
        self._sequence_of, self.windows_per_epoch = np.arange(self.fitting.read), self.fitting.read
        if not alone:
            packing = pack(self.fitting.lengths, seq_length)
            self._sequence_of = np.concatenate([np.asarray(placed) for _, placed in packing.order])
            self.windows_per_epoch = packing.sequences
        self.num_tokens = self.windows_per_epoch * seq_length + 1
        """As many as make so many windows of text: what the share in a blend is taken by."""
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None  # (number, examples, bounds)

    @property
    def fill(self) -> float:
        """Share of the positions that hold tokens of examples."""
        return fill(self.fitting.lengths, self.windows_per_epoch, self.seq_length)

    def examples(self, index: int) -> np.ndarray:
        """Numbers of the examples in the ``index``-th sequence, counted over all epochs, in their order."""
        epoch, position = divmod(index, self.windows_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, *self._arrange(epoch))
        _, examples, bounds = self._epoch
        return examples[bounds[position] : bounds[position + 1]]

    def sample(self, index: int) -> Sample:
        """The ``index``-th sequence, counted over all epochs."""
        window = np.zeros((2, self.seq_length), dtype=np.int64)
        loss_mask = np.zeros(self.seq_length, dtype=np.float32)
        bounds = [0]
        for example in self.examples(index).tolist():
            start, length, begin = int(self._starts[example]), int(self._lengths[example]), bounds[-1]
            end = begin + length
            ids = self._tokens.read(start, length + 1)
            window[0, begin:end], window[1, begin:end] = ids[:-1], ids[1:]
            loss_mask[begin:end] = self._loss.read(start + 1, length)
            bounds.append(end)
        if bounds[-1] < self.seq_length:
            bounds.append(self.seq_length)
        tokens, labels = torch.from_numpy(window)
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": torch.from_numpy(loss_mask),
            "cu_seqlens": torch.tensor(bounds),
        }

    def stretches(self, index: int) -> list[tuple[int, int]]:
        """Where its examples lie in the file: first token, and how many, of each."""
        examples = self.examples(index).tolist()
        return [(int(self._starts[each]), int(self._lengths[each]) + 1) for each in examples]

    def predicted_tokens(self, sequences: int) -> int:
        """Labels that carry loss in the first ``sequences``."""
        if sequences == self.windows_per_epoch and not self.fitting.truncated and not self.fitting.dropped:
            return self._loss.loss_tokens
        examples = np.concatenate([self.examples(number) for number in range(sequences)] or [np.arange(0)])
        pairs = zip(self._starts[examples].tolist(), self._lengths[examples].tolist(), strict=True)
        return sum(int(self._loss.read(start + 1, length).sum()) for start, length in pairs)

    def describe(self) -> str:
        """How it is read, in a line."""
        fitting = self.fitting
        cut_off = f"; {fitting.truncated:,} longer ones are cut off" if fitting.truncated else ""
        left_out = f"; {fitting.dropped:,} longer ones are left out" if fitting.dropped else ""
        return (
            f"{fitting.read:,} examples in {self.windows_per_epoch:,} sequences of {self.seq_length:,}, "
            f"{self.fill:.1%} filled{cut_off}{left_out}"
        )

    def _arrange(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Examples of all sequences of ``epoch``, one sequence behind the other, and where each begins."""
        place, sequence = np.arange(len(self._lengths)), np.arange(self.windows_per_epoch)
        if self.seed is not None:
            # RandomState, not Generator: see gpt_dataset.
            random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([*self.seed, epoch])))
            place, sequence = random.permutation(len(place)), random.permutation(len(sequence))
        # Longest first, as the packing counts them; equally long ones by their place in this epoch.
        by_length = np.lexsort((place, -self._lengths))[: len(self._sequence_of)]
        position = sequence[self._sequence_of]
        inside = np.lexsort((place[by_length], position))
        bounds = np.searchsorted(position[inside], np.arange(self.windows_per_epoch + 1))
        return by_length[inside], bounds


class ValidExamples(HeldOutSamples):
    """Held-out examples, once, in sequences that are always the same.

    Args:
        parts: the held-out datasets, one behind the other.
        num_samples: take at most that many sequences; None takes all.
    """

    def __init__(self, parts: Sequence[PackedExamples], num_samples: int | None) -> None:
        self._parts = list(parts)
        self.seq_length = self._parts[0].seq_length
        self._ends = np.cumsum([part.windows_per_epoch for part in self._parts])
        available = int(self._ends[-1])
        self.num_samples = available if num_samples is None else min(num_samples, available)

    def predicted_tokens(self) -> list[int]:
        """Labels that carry loss, of each dataset."""
        begins = [0, *self._ends[:-1].tolist()]
        bounds = zip(begins, self._ends.tolist(), strict=True)
        read = [min(max(self.num_samples - begin, 0), end - begin) for begin, end in bounds]
        return [part.predicted_tokens(count) for part, count in zip(self._parts, read, strict=True)]

    def _sample(self, index: int) -> Sample:
        which = int(np.searchsorted(self._ends, index, side="right"))
        sample = self._parts[which].sample(index - (int(self._ends[which - 1]) if which else 0))
        return sample if len(self._parts) == 1 else {**sample, "dataset": torch.tensor(which)}


def open_valid_examples(
    prefixes: Sequence[str],
    seq_length: int,
    num_samples: int | None = None,
    vocab_size: int | None = None,
    *,
    long: LongExamples = LongExamples.truncate,
    alone: bool = False,
) -> ValidExamples:
    """Open and check held-out datasets of examples.

    Args:
        prefixes: at least one.
        seq_length: tokens of a sequence.
        num_samples: sequences to use at most; None for all.
        vocab_size: the model's vocabulary; None skips that check.
        long: what becomes of longer examples.
        alone: see :class:`PackedExamples`.

    Raises:
        DataError: as :class:`PackedExamples` does.
    """
    parts = [
        PackedExamples(prefix, seq_length, long, vocab_size=vocab_size, alone=alone) for prefix in prefixes
    ]
    return ValidExamples(parts, num_samples)


def build_examples(
    data: DataConfig,
    seq_length: int,
    train_samples: int,
    valid_samples: int | None = None,
    seed: int = 1234,
    vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    long: LongExamples = LongExamples.truncate,
) -> tuple[TrainDataset, ValidExamples | None]:
    """Open, check and blend the examples of a run, as gpt_dataset's ``build_datasets`` does with text.

    Args:
        data: prefixes and weights; without weights datasets weigh by the sequences that they fill.
        seq_length: tokens of a sequence.
        train_samples: sequences of the whole run.
        valid_samples: held-out sequences to use at most; None for all.
        seed: decides the order of training.
        vocab_size: the model's vocabulary; None skips that check.
        tokenizer: the run's; the datasets must have been made with it. None skips that check.
        long: what becomes of longer examples.

    Raises:
        ConfigurationError: no train prefix, or weights that don't fit them.
        DataError: as :class:`PackedExamples` does, or tokens of another tokenizer.
    """
    check_train(data)
    for prefix in [*data.train_prefixes, *data.valid]:
        if tokenizer is not None:
            check_same_tokenizer(prefix, tokenizer)
    parts = [
        PackedExamples(prefix, seq_length, long, (seed, number), vocab_size)
        for number, prefix in enumerate(data.train_prefixes)
    ]
    train = TrainDataset(parts, data.train_weights, train_samples)
    for part, samples in zip(parts, train.samples_per_part(), strict=True):
        epochs = samples / part.windows_per_epoch
        logger.info("train dataset %s: %s; %.2f epochs", part.prefix, part.describe(), epochs)
    if not data.valid:
        return train, None
    return train, open_valid_examples(data.valid, seq_length, valid_samples, vocab_size, long=long)
