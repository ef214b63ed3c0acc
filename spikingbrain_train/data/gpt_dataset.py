"""Training and held-out samples: windows of indexed tokens, a pure function of (seed, sample index).

Why not megatron-core's GPTDataset: its order depends on the number of samples asked for (a run that is
prolonged and resumed would see other data), rank 0 builds and pickles index files beside the tokens while the
others wait at a barrier (an error on rank 0 hangs them), and it shuffles held-out data and drops or repeats
its end. Cutting the concatenated tokens into windows needs no index at all. The file format and blending are
megatron-core's.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from spikingbrain_train.config.run import DataConfig
from spikingbrain_train.config.run_record import blend_shares
from spikingbrain_train.data.indexed import (
    TokenFile,
    check_same_tokenizer,
    document_starts,
    open_indexed_dataset,
)
from spikingbrain_train.data.packing.layout import packing_of
from spikingbrain_train.data.packing.packed_documents import PackedDocuments
from spikingbrain_train.data.sample import Sample, sample_of
from spikingbrain_train.data.tokenizers import Tokenizer
from spikingbrain_train.errors import DataError
from spikingbrain_train.planning.file_checks import check_train

logger = logging.getLogger(__name__)


class TrainPart(Protocol):
    """What a blend takes its samples from: one dataset, endlessly."""

    prefix: str
    seq_length: int
    num_tokens: int
    windows_per_epoch: int

    def sample(self, index: int) -> Sample:
        """The ``index``-th sample, counted over all epochs; a pure function of it."""
        ...

    def stretches(self, index: int) -> list[tuple[int, int]]:
        """Where its tokens lie in the file: the first of each stretch, and how many; in tokens."""
        ...


class _Windows:
    """Any stretch of the concatenated documents of an indexed dataset as a sample."""

    def __init__(self, dataset: TokenFile, seq_length: int, reset_at_documents: bool) -> None:
        self.dataset = dataset
        self.seq_length = seq_length
        self.num_tokens = dataset.num_tokens
        self._document_starts = document_starts(dataset) if reset_at_documents else None

    def sample(self, first: int) -> Sample:
        """The sample that starts at token ``first``; padded with masked zeros where the tokens end."""
        count = min(self.seq_length + 1, self.num_tokens - first)
        padded = np.zeros(self.seq_length + 1, dtype=np.int64)
        padded[:count] = self.dataset.read(first, count)
        loss_mask = np.zeros(self.seq_length, dtype=np.float32)
        loss_mask[: count - 1] = 1.0
        if self._document_starts is None:
            return sample_of(padded, loss_mask, None)
        low, high = np.searchsorted(self._document_starts, (first + 1, first + count))
        return sample_of(padded, loss_mask, self._document_starts[low:high] - first)

    def predicted_tokens(self, windows: int) -> int:
        """Labels that carry loss in the first ``windows`` samples that share no label."""
        labels = min(windows * self.seq_length, self.num_tokens - 1)
        if self._document_starts is None:
            return labels
        low, high = np.searchsorted(self._document_starts, (1, labels + 1))
        return labels - int(high - low)


class ShuffledWindows:
    """Endless epochs over one indexed dataset, each in its own order.

    The documents are taken as one stream, as they lie on disk, and cut into windows of seq_length tokens and
    their labels. What is left when the stream doesn't divide is skipped at a position that changes with the
    epoch.

    Args:
        dataset: the tokens.
        seq_length: tokens of a sample.
        seed: (run seed, number of the dataset in the blend); both decide the order.
        reset_at_documents: keep the documents of a sample apart.
    """

    def __init__(
        self,
        dataset: TokenFile,
        seq_length: int,
        seed: tuple[int, int],
        *,
        reset_at_documents: bool = False,
    ) -> None:
        self._windows = _Windows(dataset, seq_length, reset_at_documents)
        self.prefix = dataset.prefix
        self.seq_length = seq_length
        self.seed = seed
        self.num_tokens = self._windows.num_tokens
        self.windows_per_epoch = (self.num_tokens - 1) // seq_length
        self._epoch: tuple[int, int, np.ndarray] | None = None  # (number, first token, order)

    def sample(self, index: int) -> Sample:
        """The ``index``-th sample, counted over all epochs."""
        return self._windows.sample(self._first_token(index))

    def stretches(self, index: int) -> list[tuple[int, int]]:
        """One: its tokens and the label of the last."""
        return [(self._first_token(index), self.seq_length + 1)]

    def _first_token(self, index: int) -> int:
        epoch, position = divmod(index, self.windows_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, *self._shuffle(epoch))
        _, first, order = self._epoch
        return first + int(order[position]) * self.seq_length

    def _shuffle(self, epoch: int) -> tuple[int, np.ndarray]:
        """First token of the first window, and the order of the windows, in ``epoch``."""
        # RandomState, not Generator: NumPy guarantees its stream for ever, so a resumed run may have a newer
        # NumPy.
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([*self.seed, epoch])))
        left_over = self.num_tokens - 1 - self.windows_per_epoch * self.seq_length
        return int(random.randint(left_over + 1)), random.permutation(self.windows_per_epoch)


class Samples(torch.utils.data.Dataset[Sample], ABC):
    """Samples by their number."""

    num_samples: int

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int | None) -> Sample:
        """The ``index``-th sample; None gives one without loss that fills up a batch."""
        if index is None:
            first = self[0]
            return {**first, "loss_mask": torch.zeros_like(first["loss_mask"])}
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        return self._sample(index)

    @abstractmethod
    def _sample(self, index: int) -> Sample:
        """Sample ``index``, which exists."""


class HeldOutSamples(Samples):
    """Samples that an evaluation reads."""

    seq_length: int
    """Tokens of each."""

    @abstractmethod
    def predicted_tokens(self) -> list[int]:
        """Labels that carry loss, of each dataset."""


class TrainDataset(Samples):
    """A blend of shuffled datasets, ``num_samples`` long.

    Sample i is the same whatever num_samples is: prolonging a run changes nothing that was seen before.

    Args:
        parts: the datasets.
        weights: sampling weight of each, any positive scale; None takes them by their size.
        num_samples: length.
    """

    def __init__(self, parts: Sequence[TrainPart], weights: Sequence[float] | None, num_samples: int) -> None:
        self.parts = list(parts)
        shares = blend_shares(weights, [part.num_tokens for part in self.parts], self.parts[0].seq_length)
        self.weights = np.asarray(shares, dtype=np.float64)
        self.num_samples = num_samples
        self._part_of_sample: np.ndarray | None = None
        self._index_in_part: np.ndarray | None = None
        if len(self.parts) > 1:
            from megatron.core.datasets.helpers_cpp import build_blending_indices

            self._part_of_sample = np.zeros(num_samples, dtype=np.int16)
            self._index_in_part = np.zeros(num_samples, dtype=np.int64)
            # Greedy: each sample comes from the dataset that lags most behind its share, so after any number
            # of samples every dataset is within one sample (or few, with many datasets) of weight * samples.
            build_blending_indices(
                self._part_of_sample, self._index_in_part, self.weights, len(self.parts), num_samples, False
            )

    def _sample(self, index: int) -> Sample:
        part, local = self.part_of(index)
        return part.sample(local)

    def part_of(self, index: int) -> tuple[TrainPart, int]:
        """The dataset that sample ``index`` comes from, and its number there."""
        if self._part_of_sample is None or self._index_in_part is None:
            return self.parts[0], index
        return self.parts[int(self._part_of_sample[index])], int(self._index_in_part[index])

    def samples_per_part(self) -> list[int]:
        """How many of the samples come from each dataset."""
        if self._part_of_sample is None:
            return [self.num_samples]
        return np.bincount(self._part_of_sample, minlength=len(self.parts)).tolist()


class ValidDataset(HeldOutSamples):
    """Held-out tokens, once, in order, in windows that share no label.

    Every token but the first of each dataset is a label exactly once; the last window of each dataset is
    padded.

    Args:
        datasets: the held-out datasets, one behind the other.
        seq_length: tokens of a sample.
        num_samples: take at most that many windows; None takes all.
        reset_at_documents: keep the documents of a window apart.
    """

    def __init__(
        self,
        datasets: Sequence[TokenFile],
        seq_length: int,
        num_samples: int | None,
        *,
        reset_at_documents: bool = False,
    ) -> None:
        self._datasets = [_Windows(dataset, seq_length, reset_at_documents) for dataset in datasets]
        self.seq_length = seq_length
        windows = [math.ceil((dataset.num_tokens - 1) / seq_length) for dataset in self._datasets]
        self._ends = np.cumsum(windows)
        available = int(self._ends[-1])
        self.num_samples = available if num_samples is None else min(num_samples, available)

    def predicted_tokens(self) -> list[int]:
        """Labels that carry loss, of each dataset."""
        begins = [0, *self._ends[:-1].tolist()]
        windows = [
            min(max(self.num_samples - begin, 0), end - begin)
            for begin, end in zip(begins, self._ends.tolist(), strict=True)
        ]
        return [
            dataset.predicted_tokens(count) for dataset, count in zip(self._datasets, windows, strict=True)
        ]

    def _sample(self, index: int) -> Sample:
        which = int(np.searchsorted(self._ends, index, side="right"))
        first = (index - (int(self._ends[which - 1]) if which else 0)) * self.seq_length
        sample = self._datasets[which].sample(first)
        return sample if len(self._datasets) == 1 else {**sample, "dataset": torch.tensor(which)}


def build_datasets(
    data: DataConfig,
    seq_length: int,
    train_samples: int,
    valid_samples: int | None = None,
    seed: int = 1234,
    vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> tuple[TrainDataset, ValidDataset | None]:
    """Open, check and blend the datasets of a run.

    Only reads files: every rank calls it and reaches the same result or the same error without communication.

    Args:
        data: prefixes and weights.
        seq_length: tokens of a sample.
        train_samples: samples of the whole run (train_iters * global_batch_size), whatever was consumed
            already.
        valid_samples: held-out windows to use at most; None for all.
        seed: decides the order of training samples.
        vocab_size: the model's vocabulary; None skips that check.
        tokenizer: the run's tokenizer; the datasets must have been made with it. None skips that check.

    Returns:
        Training samples, and held-out samples or None when data.valid is empty.

    Raises:
        ConfigurationError: no train prefix, or weights that don't fit them.
        DataError: missing, damaged or too short datasets, or tokens of another tokenizer.
    """
    check_train(data)
    for prefix in [*data.train_prefixes, *data.valid]:
        if tokenizer is not None:
            check_same_tokenizer(prefix, tokenizer)
    train = [open_indexed_dataset(prefix, vocab_size) for prefix in data.train_prefixes]
    valid = None
    if data.valid:
        valid = open_valid_dataset(
            data.valid, seq_length, valid_samples, vocab_size, reset_at_documents=data.reset_at_documents
        )
    for prefix, dataset in zip(data.train_prefixes, train, strict=True):
        if dataset.num_tokens < seq_length + 1:
            raise DataError(
                f"the train dataset {prefix} has {dataset.num_tokens} tokens but one sample needs "
                f"{seq_length + 1} (stage.seq_length + 1): add text or lower stage.seq_length to at most "
                f"{dataset.num_tokens - 1}"
            )
    packing, apart = packing_of(data, seq_length), data.reset_at_documents
    parts: list[TrainPart] = []
    for number, dataset in enumerate(train):
        order = (seed, number)
        if packing is None:
            parts.append(ShuffledWindows(dataset, seq_length, order, reset_at_documents=apart))
        else:
            parts.append(PackedDocuments(dataset, packing, order, reset_at_documents=apart))
    train_dataset = TrainDataset(parts, data.train_weights, train_samples)
    for prefix, part, samples in zip(
        data.train_prefixes, parts, train_dataset.samples_per_part(), strict=True
    ):
        logger.info(
            "train dataset %s: %d tokens, %d samples, %.2f epochs",
            prefix,
            part.num_tokens,
            samples,
            samples / part.windows_per_epoch,
        )
    return train_dataset, valid


def open_valid_dataset(
    prefixes: Sequence[str],
    seq_length: int,
    num_samples: int | None = None,
    vocab_size: int | None = None,
    *,
    reset_at_documents: bool = False,
) -> ValidDataset:
    """Open and check held-out datasets: the windows that a run with ``data.valid=prefixes`` evaluates on.

    Args:
        prefixes: indexed datasets, at least one.
        seq_length: tokens of a window.
        num_samples: windows to use at most; None for all.
        vocab_size: the model's vocabulary; None skips that check.
        reset_at_documents: keep the documents of a window apart.

    Raises:
        DataError: missing, damaged or too short datasets, or tokens that the model has no embedding for.
    """
    datasets = [open_indexed_dataset(prefix, vocab_size) for prefix in prefixes]
    for prefix, dataset in zip(prefixes, datasets, strict=True):
        if dataset.num_tokens < 2:
            raise DataError(
                f"the valid dataset {prefix} has 1 token, which predicts nothing: hold out more text"
            )
    return ValidDataset(datasets, seq_length, num_samples, reset_at_documents=reset_at_documents)
