"""What is counted of the activations inside feed-forwards while a model reads text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Channels that are counted together; data- and context-parallel ranks hold the same ones."""

    layer: int
    """Of the whole decoder, from 0."""
    name: str
    """Path of the feed-forward or expert in the layer."""
    shard: tuple[int, ...] = ()
    """Which share of it a rank holds: tensor- and expert-parallel ranks."""


class GateRecord:
    """Counts of some channels.

    Args:
        channels: that are counted.
        device: where they are.
        copies: how often each token goes through, on all ranks together.

    Attributes:
        tokens: that have gone through.
        active: [channels] int64, of how many of them each channel was not zero.
    """

    def __init__(self, channels: int, device: torch.device, copies: int) -> None:
        self.tokens, self.copies = 0, copies
        self.active = torch.zeros(channels, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, inside: Tensor) -> None:
        """Count [..., channels] activations."""
        inside_NF = inside.reshape(-1, inside.shape[-1])
        self.tokens += len(inside_NF)
        self.active += torch.count_nonzero(inside_NF, dim=0)


class LayerCounts(NamedTuple):
    """Of one layer."""

    computed: int
    """Products of all tokens; of experts those that tokens are sent to."""
    active: int
    """That were not zero."""
    channels: int
    never_active: int
    """Channels, of all experts, that were zero at every token."""
    always_active: int
    """Channels that were not zero at any token."""


class GateRecords:
    """Of all feed-forwards whose gate has zeros."""

    def __init__(self) -> None:
        self._parts: dict[Part, GateRecord] = {}

    def add(self, part: Part, inside: Tensor, copies: int = 1) -> None:
        """Count what a feed-forward makes of its tokens, [..., channels]; ``copies`` as in GateRecord."""
        record = self._parts.get(part)
        if record is None:
            record = self._parts[part] = GateRecord(inside.shape[-1], inside.device, copies)
        record.add(inside)

    @classmethod
    def merged(cls, parts: Sequence[GateRecords]) -> GateRecords:
        """Those of all ranks as one, on the CPU."""
        whole = cls()
        for records in parts:
            for part, record in records._parts.items():
                into = whole._parts.get(part)
                if into is None:
                    into = whole._parts[part] = GateRecord(
                        len(record.active), torch.device("cpu"), record.copies
                    )
                into.tokens += record.tokens
                into.active += record.active.cpu()
        return whole

    def layers(self) -> dict[int, LayerCounts]:
        """By layer; layers without such feed-forwards have none."""
        found: dict[int, LayerCounts] = {}
        for part in sorted(self._parts):
            record = self._parts[part]
            counts = LayerCounts(
                record.tokens // record.copies * len(record.active),
                int(record.active.sum()) // record.copies,
                len(record.active),
                int((record.active == 0).sum()),
                int((record.active == record.tokens).sum()) if record.tokens else 0,
            )
            before = found.get(part.layer, LayerCounts(0, 0, 0, 0, 0))
            found[part.layer] = LayerCounts(*(a + b for a, b in zip(before, counts, strict=True)))
        return found

    @property
    def sparsity(self) -> float:
        """Share of zeros, over all layers (ProSparse, arXiv 2402.13516, section 3.1)."""
        layers = self.layers().values()
        return 1 - sum(each.active for each in layers) / sum(each.computed for each in layers)
