"""Training samples of a packed dataset: a pure function of (seed, sample index)."""

from __future__ import annotations

import numpy as np

from spikingbrain_train.data.domains import read_domains
from spikingbrain_train.data.packing.layout import WHOLE, Layout, Packing, lay_out
from spikingbrain_train.data.sample import Sample, sample_of
from spikingbrain_train.data.token_file import TokenFile, document_lengths, document_starts
from spikingbrain_train.errors import DataError


class PackedDocuments:
    """Endless epochs over one indexed dataset that is laid out for samples, each in its own order.

    An epoch has as many samples of each domain as its tokens make. What is left when a stream doesn't divide
    is skipped at a position that changes from one pass over it to the next.

    Args:
        dataset: the tokens.
        packing: what samples are made of.
        seed: (run seed, number of the dataset in the blend); both decide the order.
        reset_at_documents: keep the documents of a sample apart.

    Raises:
        DataError: damaged domains, or no domain with as many tokens as a sample needs.
    """

    def __init__(
        self, dataset: TokenFile, packing: Packing, seed: tuple[int, int], *, reset_at_documents: bool = False
    ) -> None:
        self.prefix, self.seq_length = dataset.prefix, packing.seq_length
        self.num_tokens = dataset.num_tokens
        self.layout = lay_out_dataset(dataset.prefix, packing)
        self.windows_per_epoch = self.layout.samples_per_epoch
        if self.windows_per_epoch == 0:
            raise DataError(
                f"no domain of the train dataset {dataset.prefix} has {packing.seq_length + 1} tokens, which "
                "one sample needs (stage.seq_length + 1): add text, lower stage.seq_length, or set "
                "data.pack_by_domain=false"
            )
        self._dataset = dataset
        self._seed = seed
        self._document_starts = document_starts(dataset) if reset_at_documents else None
        self._epoch: tuple[int, np.ndarray] | None = None  # (number, positions)

    def sample(self, index: int) -> Sample:
        """The ``index``-th sample, counted over all epochs."""
        return self._read(self._position(index))

    def stretches(self, index: int) -> list[tuple[int, int]]:
        """Where its tokens and the label of the last lie in the file: first token, and how many, of each."""
        return [
            (first, count)
            for first, count, _ in self.layout.actual(self._position(index), self.seq_length + 1)
        ]

    def _position(self, index: int) -> int:
        epoch, number = divmod(index, self.windows_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, epoch_positions(self.layout, self._seed, epoch))
        return int(self._epoch[1][number])

    def _read(self, position: int) -> Sample:
        window = np.empty(self.seq_length + 1, dtype=np.int64)
        loss_mask = np.ones(self.seq_length, dtype=np.float32)
        starts: list[np.ndarray] = []
        filled = 0
        for first, count, is_rest in self.layout.actual(position, self.seq_length + 1):
            window[filled : filled + count] = self._dataset.read(first, count)
            if filled:
                starts.append(np.array([filled]))
                if is_rest:  # the middle of a document follows from nothing before it
                    loss_mask[filled - 1] = 0.0
            if self._document_starts is not None:
                low, high = np.searchsorted(self._document_starts, (first + 1, first + count))
                starts.append(self._document_starts[low:high] - first + filled)
            filled += count
        if self._document_starts is None:
            return sample_of(window, loss_mask, None)
        return sample_of(window, loss_mask, np.concatenate(starts).astype(np.int64))


def lay_out_dataset(prefix: str, packing: Packing) -> Layout:
    """The layout of the dataset at ``prefix``, from its index and its domains. Raises DataError."""
    _, lengths = document_lengths(prefix)
    domains = read_domains(prefix, len(lengths)) if packing.by_domain else None
    return lay_out(lengths, None if domains is None else domains.of_document, packing)


def epoch_positions(layout: Layout, seed: tuple[int, int], epoch: int) -> np.ndarray:
    """Virtual positions of an epoch's samples in their order [samples_per_epoch] int64.

    Where an epoch takes another number of samples from a pool than it has, the pool is gone through on its
    own: the next epoch goes on where this one ends.
    """
    pools = layout.pools
    taken = [_taken(layout, seed, epoch, pool) for pool in range(len(pools.quota))]
    order = _random([*seed, epoch]).permutation(layout.samples_per_epoch)
    return np.concatenate(taken)[order]


def _taken(layout: Layout, seed: tuple[int, int], epoch: int, pool: int) -> np.ndarray:
    pools, length = layout.pools, layout.packing.seq_length
    samples, quota = int(pools.samples[pool]), int(pools.quota[pool])
    left_over = int(pools.tokens[pool]) - 1 - samples * length
    first, end = epoch * quota, (epoch + 1) * quota
    found = [np.empty(0, dtype=np.int64)]
    while first < end:
        passed, at = divmod(first, samples)
        # Behind the seed of epochs by a number from 1: seeds that differ in zeros at their end are one.
        random = _random([*seed, passed, pool + 1])
        numbers = random.permutation(samples)[at : at + end - first]
        if pools.kind[pool] == WHOLE:
            found.append(positions_of_whole(layout, pool, numbers))
        else:
            found.append(int(pools.begin[pool]) + int(random.randint(left_over + 1)) + numbers * length)
        first += len(numbers)
    return np.concatenate(found)


def positions_of_whole(layout: Layout, pool: int, numbers: np.ndarray) -> np.ndarray:
    """Virtual positions of samples that are of one document each."""
    pools = layout.pools
    begin = layout.stretch_virtual[layout.first_whole : -1]
    ends = np.cumsum(layout.whole_samples)
    before = int(pools.samples[:pool][pools.kind[:pool] == WHOLE].sum())
    document = np.searchsorted(ends, numbers + before, side="right")
    inside = numbers + before - (ends[document] - layout.whole_samples[document])
    return begin[document] + inside * layout.packing.seq_length


def _random(seed: list[int]) -> np.random.RandomState:
    # RandomState, not Generator: NumPy guarantees its stream for ever, so a resumed run may have a newer
    # NumPy.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
