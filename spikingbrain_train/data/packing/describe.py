"""Ways to pack a dataset beside each other: what ``spikingbrain-preprocess --describe --seq-length`` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spikingbrain_train.data.indexed import read_info
from spikingbrain_train.data.packing.layout import Packing
from spikingbrain_train.data.packing.report import domain_table, statistics_table
from spikingbrain_train.data.packing.statistics import PackingStatistics, packing_statistics

_SHARE = 0.5
"""Of long documents, in the last of the ways that are shown."""


@dataclass(frozen=True)
class WaysToPack:
    """One dataset, packed as the settings of a run could have it."""

    prefix: str
    ways: list[tuple[str, PackingStatistics]]
    """Settings of a run, and what comes of them."""

    def text(self) -> list[str]:
        """Lines for people."""
        statistics = self.ways[0][1]
        length = statistics.packing.seq_length
        lines = [
            "",
            f"{self.prefix} in samples of {length:,} tokens: how many in an epoch, their documents, how many",
            f"are of one; their tokens from documents of at least {length:,} and {length // 2:,} tokens, of",
            f"which the text has {statistics.full:.1%} and {statistics.half:.1%}",
            *statistics_table(self.ways),
        ]
        with_domains = next((found for _, found in self.ways if found.domains), None)
        if with_domains is not None:
            lines += ["", *domain_table(with_domains)]
        return lines

    def as_values(self) -> dict[str, Any]:
        """For programs."""
        return {
            "prefix": self.prefix,
            "ways": [{"settings": settings, **found.as_values()} for settings, found in self.ways],
        }


def ways_to_pack(prefix: str, seq_length: int) -> WaysToPack:
    """Look at a dataset. Raises DataError where it is damaged."""
    info = read_info(prefix)
    by_domain = info is not None and info.domains is not None
    ways = [("as it lies", Packing(seq_length, by_domain=False))]
    if by_domain:
        ways.append(("data.pack_by_domain=true", Packing(seq_length, by_domain=True)))
    ahead = "... " if by_domain else ""
    ways += [
        (f"{ahead}data.long_documents.share={share:g}", Packing(seq_length, by_domain, share))
        for share in (0.0, _SHARE)
    ]
    return WaysToPack(prefix, [(name, packing_statistics(prefix, packing)) for name, packing in ways])
