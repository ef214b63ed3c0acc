"""What samples of a packed dataset are made of, told from lengths and domains of its documents."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from spikingbrain_train.data.domains import Domains, read_domains
from spikingbrain_train.data.packing.layout import WHOLE, Layout, Packing, lay_out, piece_lengths
from spikingbrain_train.data.token_file import document_lengths

_CHUNK_DOCUMENTS = 1 << 22


@dataclass(frozen=True)
class DomainStatistics:
    """One domain."""

    name: str
    documents: int
    tokens: int
    full: float
    """Share of its tokens in documents of at least seq_length tokens."""
    samples: int
    """Of an epoch; 0 where it has fewer tokens than one needs."""
    documents_per_sample: float
    full_in_samples: float
    """Share of the tokens that its samples take from documents of at least seq_length tokens."""


@dataclass(frozen=True)
class PackingStatistics:
    """A dataset and the samples that it makes. Shares are of one epoch, and go from 0 to 1."""

    prefix: str
    packing: Packing
    documents: int
    tokens: int
    samples: int
    documents_per_sample: float
    """Mean; a document that two samples share counts in both."""
    most_documents: int
    """Of one sample."""
    of_one_document: float
    """Share of samples that lie in one document."""
    full: float
    """Share of the dataset's tokens in documents of at least seq_length tokens."""
    full_in_samples: float
    """The same of the samples' tokens."""
    half: float
    """Share of the dataset's tokens in documents of at least half of seq_length."""
    half_in_samples: float
    """The same of the samples' tokens."""
    long_samples: float
    """Share of samples that come of long documents; 0 where none are preferred."""
    repeats: float
    """How often the long documents that are read most often are, while the dataset is read once."""
    left_over: int
    """Tokens that a pass over each stream skips, at other positions each time."""
    left_out: int
    """Tokens of domains that no sample is made of."""
    domains: list[DomainStatistics] = field(default_factory=list)
    """Empty where the dataset stores none, or samples are not of one domain."""

    def as_values(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


@dataclass(frozen=True)
class _Streams:
    """What lies in the streams; arrays [pools], 0 for whole documents."""

    per_sample: np.ndarray
    """Mean number of documents of a sample."""
    most: np.ndarray
    alone: np.ndarray
    """Share of samples that lie in one document."""
    full: np.ndarray
    """Share of tokens in documents of at least seq_length."""
    half: np.ndarray
    """Share of tokens in documents of at least half of that."""
    left_out: int
    """Tokens of streams that make no sample."""


def packing_statistics(prefix: str, packing: Packing) -> PackingStatistics:
    """Lay a dataset out and count. Raises DataError where it, or its domains, are damaged."""
    _, lengths = document_lengths(prefix)
    stored = read_domains(prefix, len(lengths)) if packing.by_domain else None
    of_document = None if stored is None else stored.of_document
    layout = lay_out(lengths, of_document, packing)
    pools, tokens, length = layout.pools, int(lengths.sum(dtype=np.int64)), packing.seq_length
    streams = _streams(lengths, of_document, layout)
    weights = pools.quota / max(int(pools.quota.sum()), 1)
    in_streams, is_long = pools.kind != WHOLE, pools.is_long
    skipped = pools.tokens[in_streams] - 1 - pools.samples[in_streams] * length
    return PackingStatistics(
        prefix=prefix,
        packing=packing,
        documents=len(lengths),
        tokens=tokens,
        samples=layout.samples_per_epoch,
        documents_per_sample=float(weights @ streams.per_sample),
        most_documents=int(streams.most.max(initial=0)),
        of_one_document=float(weights @ streams.alone),
        full=_share_of(lengths, length, tokens),
        full_in_samples=float(weights @ streams.full),
        half=_share_of(lengths, length / 2, tokens),
        half_in_samples=float(weights @ streams.half),
        long_samples=float(weights[is_long].sum()),
        repeats=float((pools.quota[is_long] / pools.samples[is_long]).max(initial=0.0)),
        left_over=int(skipped.sum()),
        left_out=streams.left_out,
        domains=[] if stored is None else _domains(stored, lengths, layout, streams),
    )


def _share_of(lengths: np.ndarray, least: float, tokens: int) -> float:
    """Share of the tokens in documents of at least so many."""
    return float(lengths[lengths >= least].sum(dtype=np.int64)) / max(tokens, 1)


def _streams(lengths: np.ndarray, domains: np.ndarray | None, layout: Layout) -> _Streams:
    """Follow every document to its place, some millions at a time."""
    pools, length = layout.pools, layout.packing.seq_length
    number, in_streams = len(pools.quota), np.flatnonzero(pools.kind != WHOLE)
    windows = np.where(pools.kind == WHOLE, 0, pools.samples)
    first_window = np.cumsum(windows) - windows
    counts, _, _ = piece_lengths(lengths, domains, layout.packing)
    begin, virtual = _by_place(layout)
    documents = np.zeros(int(windows.sum()), dtype=np.int64)
    tokens, full, half = np.zeros((3, number))
    at = left_out = 0
    for chunk in range(0, len(lengths), _CHUNK_DOCUMENTS):
        of_document, of_piece = (each[chunk : chunk + _CHUNK_DOCUMENTS] for each in (lengths, counts))
        ends = at + np.cumsum(of_document, dtype=np.int64)
        at = int(ends[-1])
        filled = np.flatnonzero(of_piece)
        of_document, of_piece = of_document[filled], of_piece[filled]
        starts = ends[filled] - of_piece  # what is in a stream is the end of a document, or all of it
        stretch = np.searchsorted(begin, starts, side="right") - 1
        place = virtual[stretch] + starts - begin[stretch]
        if len(in_streams) == 0:
            left_out += int(of_piece.sum(dtype=np.int64))
            continue
        before = np.searchsorted(pools.begin[in_streams], place, side="right") - 1
        pool = in_streams[np.maximum(before, 0)]
        inside = place - pools.begin[pool]
        belongs = (before >= 0) & (inside < pools.tokens[pool])  # else to a stream without a sample
        left_out += int(of_piece[~belongs].sum(dtype=np.int64))
        pool, inside, of_document, of_piece = (
            each[belongs] for each in (pool, inside, of_document, of_piece)
        )
        tokens += np.bincount(pool, weights=of_piece, minlength=number)
        full += np.bincount(pool, weights=of_piece * (of_document >= length), minlength=number)
        half += np.bincount(pool, weights=of_piece * (of_document >= length / 2), minlength=number)
        window = inside // length
        begins_in = (inside % length > 0) & (window < pools.samples[pool])
        window = (first_window[pool] + window)[begins_in]
        documents += np.bincount(window, minlength=len(documents))
    per_sample, most, alone = np.ones((3, number))
    for pool_ in in_streams:
        of_pool = documents[first_window[pool_] : first_window[pool_] + windows[pool_]] + 1
        per_sample[pool_], most[pool_], alone[pool_] = of_pool.mean(), of_pool.max(), (of_pool == 1).mean()
    is_whole = pools.kind == WHOLE
    full, half = (np.where(is_whole, 1.0, each / np.maximum(tokens, 1)) for each in (full, half))
    return _Streams(per_sample, most, alone, full, half, left_out)


def _by_place(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """The stretches of the streams in the order of the file: where each begins there, and virtually."""
    begin = layout.stretch_begin[: layout.first_whole]
    order = np.argsort(begin, kind="stable")
    return begin[order], layout.stretch_virtual[: layout.first_whole][order]


def _domains(
    stored: Domains, lengths: np.ndarray, layout: Layout, streams: _Streams
) -> list[DomainStatistics]:
    """Every domain that has documents, the largest first."""
    pools, number = layout.pools, len(stored.names)
    documents = np.bincount(stored.of_document, minlength=number)
    tokens = np.bincount(stored.of_document, weights=lengths, minlength=number)
    full_length = lengths * (lengths >= layout.packing.seq_length)
    full = np.bincount(stored.of_document, weights=full_length, minlength=number)
    samples, per_sample, in_samples = (
        np.bincount(pools.domain, weights=pools.quota * each, minlength=number)
        for each in (1.0, streams.per_sample, streams.full)
    )
    return [
        DomainStatistics(
            name=stored.names[each],
            documents=int(documents[each]),
            tokens=int(tokens[each]),
            full=float(full[each] / max(tokens[each], 1)),
            samples=int(samples[each]),
            documents_per_sample=float(per_sample[each] / max(samples[each], 1)),
            full_in_samples=float(in_samples[each] / max(samples[each], 1)),
        )
        for each in np.argsort(-tokens, kind="stable")
        if documents[each]
    ]
