"""Samples of one domain, and of long documents first: which stretches of a dataset they are cut from.

The documents of a dataset fall into pools. Without domains there is one; with them each domain has its own.
Where long documents are preferred, a pool falls into three:

- *whole*: documents of more tokens than a sample. Each is cut into as many samples as it fills by itself; its
  rest, shorter than a sample, is one of the short documents.
- *long*: other documents of at least ``min_tokens``, one behind the other.
- *short*: all the rest, one behind the other.

One behind the other they lie as on disk, so that neighbours there, which often belong together, stay
neighbours, and a stream is a list of stretches of the file: neighbours in one pool are one stretch. Streams
and whole documents form one row of *virtual* positions, by which samples are named; a sample is
seq_length + 1 tokens from some position on. All this takes numpy a few passes over lengths of documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from spikingbrain_train.config.run import DataConfig

WHOLE, LONG, SHORT = 0, 1, 2
"""Kinds of pools."""
KINDS = 3


@dataclass(frozen=True)
class Packing:
    """What samples are made of."""

    seq_length: int
    """Tokens of a sample."""
    by_domain: bool
    """Whether a sample is of one domain."""
    long_share: float | None = None
    """Least share of a domain's samples that come of long documents; None does not tell them from others."""
    min_tokens: int | None = None
    """Tokens of a long document; None takes those that are longer than a sample."""
    max_repeats: float = 4.0
    """How often long documents are read at most while all others are read once."""

    @property
    def long_tokens(self) -> int:
        """Tokens from which on a document is long; one that is longer than a sample always is."""
        longer = self.seq_length + 1
        return longer if self.min_tokens is None else min(self.min_tokens, longer)


def packing_of(data: DataConfig, seq_length: int) -> Packing | None:
    """How a run packs; None where it cuts samples from the tokens as they lie on disk."""
    long = data.long_documents
    if not data.pack_by_domain and long.share is None:
        return None
    return Packing(seq_length, data.pack_by_domain, long.share, long.min_tokens, long.max_repeats)


@dataclass(frozen=True)
class Pools:
    """All pools that have a sample, ordered by domain and kind; arrays [pools]."""

    domain: np.ndarray
    kind: np.ndarray
    begin: np.ndarray
    """Virtual position of the first token, int64."""
    tokens: np.ndarray
    """int64; of whole documents with their rests, which no sample reads here."""
    samples: np.ndarray
    """That it is cut into, int64."""
    quota: np.ndarray
    """Samples of an epoch, int64: other than :attr:`samples` where long documents are read more often."""

    @property
    def is_long(self) -> np.ndarray:
        """Whether its documents are long."""
        return self.kind != SHORT


@dataclass(frozen=True)
class Layout:
    """A dataset, laid out for samples."""

    packing: Packing
    pools: Pools
    stretch_begin: np.ndarray
    """Where each stretch lies in the file, in tokens, int64 [stretches]."""
    stretch_virtual: np.ndarray
    """Its virtual position, int64 [stretches + 1]; they ascend, and the last one is where all end."""
    is_rest: np.ndarray
    """Whether it begins inside a document, as rests of whole ones do, bool [stretches]."""
    whole_samples: np.ndarray
    """Samples of each whole document, int64 [whole documents]; they are the last stretches, in this order."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one epoch."""
        return int(self.pools.quota.sum())

    @property
    def first_whole(self) -> int:
        """The first stretch that is a whole document."""
        return len(self.stretch_begin) - len(self.whole_samples)

    def actual(self, position: int, count: int) -> Iterator[tuple[int, int, bool]]:
        """Where the tokens from a virtual position on lie in the file.

        Yields:
            For each stretch: first token, number of tokens, and whether it begins inside a document that
            the tokens before it are not of.
        """
        number = int(np.searchsorted(self.stretch_virtual, position, side="right")) - 1
        while count > 0:
            inside = position - int(self.stretch_virtual[number])
            here = min(count, int(self.stretch_virtual[number + 1]) - position)
            yield int(self.stretch_begin[number]) + inside, here, bool(self.is_rest[number]) and inside == 0
            position, count, number = position + here, count - here, number + 1


def lay_out(lengths: np.ndarray, domains: np.ndarray | None, packing: Packing) -> Layout:
    """Divide the documents of a dataset into pools.

    Args:
        lengths: tokens of each document, as they lie on disk [documents] whole numbers.
        domains: number of each document's domain [documents] uint16; None is one domain for all.
        packing: what samples are made of.

    Returns:
        The layout; without pools where no domain has as many tokens as a sample needs.
    """
    length = packing.seq_length
    starts = np.cumsum(lengths, dtype=np.int64)
    starts -= lengths
    counts, kinds, whole = piece_lengths(lengths, domains, packing)
    samples = (lengths[whole].astype(np.int64) - 1) // length
    starts_of_whole = starts[whole]
    starts[whole] += samples * length
    stream = _stretches(starts, counts, kinds, domains, whole)
    # Of 16 bits: numpy sorts those by their digits, in a pass or two.
    sorted_by = stream.key.astype(np.uint16) if stream.key.max(initial=0) < 2**16 else stream.key
    order = np.argsort(sorted_by, kind="stable")
    begin, tokens, key, is_rest = (
        each[order] for each in (stream.begin, stream.tokens, stream.key, stream.rest)
    )
    of_whole = _domains_of(domains, whole)
    by_domain = np.argsort(of_whole, kind="stable")
    samples, of_whole = samples[by_domain], of_whole[by_domain]
    tokens = np.concatenate((tokens, lengths[whole][by_domain].astype(np.int64)))
    virtual = np.concatenate(([0], np.cumsum(tokens, dtype=np.int64)))
    return Layout(
        packing,
        _pools(packing, virtual, key, of_whole, samples),
        np.concatenate((begin, starts_of_whole[by_domain])),
        virtual,
        np.concatenate((is_rest, np.zeros(len(whole), dtype=bool))),
        samples,
    )


def piece_lengths(
    lengths: np.ndarray, domains: np.ndarray | None, packing: Packing
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What of each document lies in a stream.

    Returns:
        Tokens of it [documents], of whole documents those of the rest; LONG or SHORT, the kind of its stream
        [documents] uint8; numbers of the whole documents.
    """
    counts = np.array(lengths)
    if packing.long_share is None:
        return counts, np.full(len(lengths), SHORT, dtype=np.uint8), np.empty(0, dtype=np.int64)
    whole = np.flatnonzero(lengths > packing.seq_length)
    # The first token of a rest has been a label already; alone it would add nothing.
    rest = (counts[whole] - 1) % packing.seq_length + 1
    counts[whole] = np.where(rest > 1, rest, 0)
    kinds = np.where(counts >= packing.long_tokens, np.uint8(LONG), np.uint8(SHORT))
    # A stream of long documents that makes no sample would be left out; among the short ones it is read.
    long = np.flatnonzero(kinds == LONG)
    of_domain = np.bincount(_domains_of(domains, long), weights=counts[long])
    too_few = of_domain <= packing.seq_length
    kinds[long[too_few[_domains_of(domains, long)]]] = SHORT
    return counts, kinds, whole


@dataclass(frozen=True)
class _Stretches:
    """Of the streams, in the order of the file; arrays [stretches]."""

    begin: np.ndarray
    tokens: np.ndarray
    key: np.ndarray
    """Twice the number of the domain, and one more for short documents."""
    rest: np.ndarray


def _stretches(
    starts: np.ndarray,
    counts: np.ndarray,
    kinds: np.ndarray,
    domains: np.ndarray | None,
    whole: np.ndarray,
) -> _Stretches:
    """Neighbours in one stream, made one."""
    key = kinds.astype(np.uint32) - LONG
    if domains is not None:
        key += domains.astype(np.uint32) * 2
    is_rest = np.zeros(len(counts), dtype=bool)
    is_rest[whole] = True
    if not counts.all():
        filled = np.flatnonzero(counts)
        starts, counts, key, is_rest = starts[filled], counts[filled], key[filled], is_rest[filled]
    if len(counts) == 0:
        return _Stretches(starts, counts.astype(np.int64), key, is_rest)
    begins = np.ones(len(counts), dtype=bool)
    begins[1:] = (starts[1:] != starts[:-1] + counts[:-1]) | (key[1:] != key[:-1])
    at = np.flatnonzero(begins)
    return _Stretches(
        starts[at], np.add.reduceat(counts, at, dtype=np.int64), key[at].astype(np.uint32), is_rest[at]
    )


def _domains_of(domains: np.ndarray | None, documents: np.ndarray) -> np.ndarray:
    if domains is None:
        return np.zeros(len(documents), dtype=np.int64)
    return domains[documents].astype(np.int64)


def _pools(
    packing: Packing, virtual: np.ndarray, key: np.ndarray, of_whole: np.ndarray, samples: np.ndarray
) -> Pools:
    """The pools of stretches that lie one behind the other, streams first, each pool in one piece."""
    pool = np.concatenate((key // 2 * KINDS + key % 2 + LONG, of_whole * KINDS + WHOLE)).astype(np.int64)
    first = np.flatnonzero(np.concatenate(([True], pool[1:] != pool[:-1]))) if len(pool) else pool
    begin = virtual[:-1][first]
    tokens = np.diff(np.append(begin, virtual[-1]))
    pool = pool[first]
    kind = pool % KINDS
    number = np.maximum(tokens - 1, 0) // packing.seq_length
    of_domain = np.bincount(of_whole, weights=samples).astype(np.int64)
    is_whole = kind == WHOLE
    number[is_whole] = of_domain[pool[is_whole] // KINDS]
    order = np.argsort(pool, kind="stable")
    order = order[number[order] > 0]
    domain, kind, number = pool[order] // KINDS, kind[order], number[order]
    return Pools(domain, kind, begin[order], tokens[order], number, _quotas(packing, domain, kind, number))


def _quotas(packing: Packing, domain: np.ndarray, kind: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Samples of an epoch from each pool: as many of each domain as it has, more of them long ones."""
    if packing.long_share is None or len(samples) == 0:
        return samples.copy()
    domains = int(domain.max()) + 1
    table = np.zeros((domains, KINDS), dtype=np.int64)
    table[domain, kind] = samples
    whole, long, short = table.T
    both, all_three = whole + long, table.sum(axis=1)
    most = np.floor(both * packing.max_repeats).astype(np.int64)
    wanted = np.rint(all_three * packing.long_share).astype(np.int64)
    quota = np.where(short > 0, np.minimum(np.maximum(np.minimum(wanted, most), both), all_three), both)
    of_whole = np.rint(quota * whole / np.maximum(both, 1)).astype(np.int64)
    quotas = np.stack((of_whole, quota - of_whole, all_three - quota), axis=1)
    return quotas[domain, kind]
