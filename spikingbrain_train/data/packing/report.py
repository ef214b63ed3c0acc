"""What packing makes of datasets, in words and tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spikingbrain_train.data.packing.layout import Packing
from spikingbrain_train.data.packing.statistics import PackingStatistics
from spikingbrain_train.reporting.quantities import quantity
from spikingbrain_train.reporting.tables import table

_MOST_DOMAINS = 20
"""Rows of a table of domains."""


def describe_packing(packing: Packing) -> str:
    """What samples are made of, in a line."""
    words = [
        f"samples of {packing.seq_length:,} tokens, "
        + ("each of one domain" if packing.by_domain else "cut from documents as they lie on disk")
    ]
    if packing.long_share is not None:
        words.append("documents that are longer on their own first")
    if packing.long_share:
        least = packing.long_tokens
        long = f"{least:,} tokens and more" if least <= packing.seq_length else "more tokens than a sample"
        often = f"read up to {packing.max_repeats:g} times as often"
        words.append(f"at least {packing.long_share:.0%} of documents of {long}, {often}")
    return "; ".join(words)


def describe_statistics(found: PackingStatistics) -> str:
    """What came of it, in a line."""
    if found.samples == 0:
        return "no domain has as many tokens as a sample needs"
    length = found.packing.seq_length
    words = [
        f"{found.samples:,} samples an epoch of {found.documents_per_sample:.1f} documents (mean; at most "
        f"{found.most_documents:,}), {found.of_one_document:.1%} of one document",
        f"{found.full_in_samples:.1%} of their tokens are of documents of at least {length:,} tokens "
        f"({found.full:.1%} of the dataset's), {found.half_in_samples:.1%} of at least {length // 2:,} "
        f"({found.half:.1%})",
    ]
    if found.packing.long_share:
        reached = f"{found.long_samples:.1%} of the samples come of long documents"
        words.append(
            f"{reached}, read up to {found.repeats:.2g} times an epoch" if found.repeats else reached
        )
    words += _domains_in_words(found)
    words.append(f"an epoch skips {found.left_over:,} tokens at the ends of streams, others each time")
    if found.left_out:
        words.append(f"{_left_out(found)} are in no sample, for want of others of their domain")
    return "; ".join(words)


def _domains_in_words(found: PackingStatistics) -> Iterator[str]:
    if not found.packing.by_domain:
        return
    if not found.domains:
        yield "no domains are stored with it, so that it is one (spikingbrain-preprocess --domain-key)"
        return
    names = [each.name for each in found.domains[:3]]
    others = f" and {len(found.domains) - 3} others" if len(found.domains) > 3 else ""
    yield f"{len(found.domains)} domains ({', '.join(names)}{others})"


def _left_out(found: PackingStatistics) -> str:
    return f"{found.left_out:,} tokens ({found.left_out / max(found.tokens, 1):.2%})"


def warnings(found: PackingStatistics, setting: str) -> Iterator[str]:
    """A sentence for everything that a user ought to look at.

    Args:
        found: the statistics.
        setting: that names the dataset: ``data.train[0]``.
    """
    name, packing = f"{setting}={found.prefix}", found.packing
    if found.left_out > 0.01 * found.tokens:
        yield (
            f"{name}: {_left_out(found)} are never read, because their domains have too few of them for a "
            "sample; store coarser domains (--domain-key, --domain-from folder), or set "
            "data.pack_by_domain=false"
        )
    share = packing.long_share
    if share and found.samples and found.long_samples < share - 0.01:
        why = (
            f"long documents are read {found.repeats:.2g} times already (data.long_documents.max_repeats)"
            if found.repeats >= 0.99 * packing.max_repeats
            else "not every domain has long documents"
        )
        yield (
            f"{name}: {found.long_samples:.1%} of its samples come of long documents, fewer than "
            f"data.long_documents.share={share:g} asks for: {why}; add long documents, or lower "
            "data.long_documents.min_tokens"
        )


def statistics_table(found: Sequence[tuple[str, PackingStatistics]]) -> list[str]:
    """A row for each way of packing, or each dataset, which the texts name; all of one seq_length."""
    length = found[0][1].packing.seq_length
    names = ["samples", "documents each", "of one", f">= {length:,}", f">= {length // 2:,}", "left over"]
    rows = [["", *names, "in no sample"]]
    for name, each in found:
        rows.append(
            [
                name,
                f"{each.samples:,}",
                f"{each.documents_per_sample:.1f}",
                f"{each.of_one_document:.1%}",
                f"{each.full_in_samples:.1%}",
                f"{each.half_in_samples:.1%}",
                quantity(each.left_over),
                quantity(each.left_out),
            ]
        )
    return table(rows, left=1)


def domain_table(found: PackingStatistics) -> list[str]:
    """A row for each domain, the largest first."""
    length = found.packing.seq_length
    rows = [["domain", "documents", "tokens", "share", f">= {length:,}", "samples", "documents each"]]
    for each in found.domains[:_MOST_DOMAINS]:
        rows.append(
            [
                each.name,
                f"{each.documents:,}",
                quantity(each.tokens),
                f"{each.tokens / max(found.tokens, 1):.1%}",
                f"{each.full:.1%}",
                f"{each.samples:,}",
                f"{each.documents_per_sample:.1f}" if each.samples else "-",
            ]
        )
    others = found.domains[_MOST_DOMAINS:]
    if others:
        documents, tokens = sum(each.documents for each in others), sum(each.tokens for each in others)
        share = f"{tokens / max(found.tokens, 1):.1%}"
        samples = f"{sum(each.samples for each in others):,}"
        name = f"{len(others):,} smaller ones"
        rows.append([name, f"{documents:,}", quantity(tokens), share, "", samples, ""])
    return table(rows, left=1)
