"""What is counted of each linear while a model reads text, and how the parts of ranks become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from spikingbrain_train.spiking.codings import BitwiseBidirectional
from spikingbrain_train.spiking.count_distribution import LARGEST, CountDistribution

PATCH_TOKENS, PATCH_CHANNELS = 8, 32
"""Of the first text, whose counts are kept one by one to be drawn; channels are spread over the width."""

_CODING = BitwiseBidirectional()


class Linear(NamedTuple):
    """Which linear of a model."""

    layer: int
    """Of the whole decoder, from 0; -1 outside of layers."""
    projection: str
    """Its path in the layer; experts share one."""


class Counted(NamedTuple):
    """Some tokens in front of a linear, counted."""

    counts: Tensor
    """[N, D] whole numbers, as they came."""
    histogram: Tensor
    """[2 * LARGEST + 1] int64 of all of them."""
    spikes_of_channel: Tensor
    """[D] int64."""


class LinearRecord:
    """Counts in front of one linear, of all experts if they have one name.

    Args:
        width: channels of its whole input.
        outputs: of its whole weight.
        device: where it is kept.

    Attributes:
        distribution: of all counts.
        spikes_of_channel: [width] int64, in the bitwise ternary coding.
        patch: at most [PATCH_TOKENS, PATCH_CHANNELS] int64, on the CPU; None before the first token, and on
            ranks that hold a part of the channels.
    """

    def __init__(self, width: int, outputs: int, device: torch.device) -> None:
        self.width, self.outputs = width, outputs
        self.distribution = CountDistribution(device=device)
        self.spikes_of_channel = torch.zeros(width, dtype=torch.int64, device=device)
        self.patch: Tensor | None = None
        counts = torch.arange(-LARGEST, LARGEST + 1, device=device)
        self._spikes_of_bin = _CODING.spikes_in(counts, LARGEST.bit_length()).float()

    @torch.no_grad()
    def add(self, counts: Tensor, first_channel: int = 0) -> Counted:
        """Count some tokens.

        Args:
            counts: [..., channels] whole numbers: all channels, or a part of them.
            first_channel: of the part.

        Returns:
            What :meth:`add_counted` of another linear takes that reads the same.
        """
        counts_ND = counts.reshape(-1, counts.shape[-1])
        bins_ND = CountDistribution.bins(counts_ND)
        counted = Counted(
            counts_ND,
            torch.bincount(bins_ND.flatten(), minlength=2 * LARGEST + 1),
            # Sums of single-precision numbers are exact here: below 2**24 for a million tokens.
            self._spikes_of_bin.take(bins_ND).sum(0).to(torch.int64),
        )
        self.add_counted(counted, first_channel)
        return counted

    def add_counted(self, counted: Counted, first_channel: int = 0) -> None:
        """Take in what :meth:`add` has counted."""
        D = counted.counts.shape[-1]
        self.distribution.histogram += counted.histogram
        self.spikes_of_channel[first_channel : first_channel + D] += counted.spikes_of_channel
        if self.patch is None and self.width == D and len(counted.counts):
            step = max(1, D // PATCH_CHANNELS)
            self.patch = counted.counts[:PATCH_TOKENS, ::step][:, :PATCH_CHANNELS].to(torch.int64).cpu()

    def merge(self, other: LinearRecord) -> None:
        """Take in what another rank has counted."""
        self.distribution.histogram += other.distribution.histogram
        self.spikes_of_channel += other.spikes_of_channel
        self.patch = other.patch if self.patch is None else self.patch

    def to_cpu(self) -> LinearRecord:
        """The same on the CPU."""
        moved = LinearRecord(self.width, self.outputs, torch.device("cpu"))
        moved.distribution.histogram += self.distribution.histogram.cpu()
        moved.spikes_of_channel += self.spikes_of_channel.cpu()
        moved.patch = self.patch
        return moved


@dataclass
class Records:
    """Of all linears, and which of them read one and the same input."""

    linears: dict[Linear, LinearRecord] = field(default_factory=dict)
    shared: dict[Linear, Linear] = field(default_factory=dict)
    """Linears whose input another one in front of them reads, too: encoded once, counted once."""

    @classmethod
    def merged(cls, parts: Sequence[Records]) -> Records:
        """Those of all ranks as one, in the order of the layers."""
        whole = cls()
        for part in parts:
            whole.shared.update(part.shared)
            for linear, record in part.linears.items():
                if linear in whole.linears:
                    whole.linears[linear].merge(record)
                else:
                    whole.linears[linear] = record
        whole.linears = dict(sorted(whole.linears.items(), key=lambda item: item[0].layer))
        return whole

    def to_cpu(self) -> Records:
        """The same on the CPU."""
        return Records({key: each.to_cpu() for key, each in self.linears.items()}, dict(self.shared))


class SharedInputs:
    """Finds linears that read the same tensor: q, k, v and gates of one layer.

    It holds the inputs of one layer, so that no two of them can have one address.
    """

    def __init__(self, records: Records) -> None:
        self._records = records
        self._layer: int | None = None
        self._seen: list[tuple[Tensor, Linear]] = []

    def first_reader(self, linear: Linear, x: Tensor) -> Linear:
        """Who read ``x`` before in this layer, else ``linear`` itself."""
        if linear.layer != self._layer:
            self._layer, self._seen = linear.layer, []
        for tensor, first in self._seen:
            if tensor is x:
                if first != linear:
                    self._records.shared[linear] = first
                return first
        if any(first == linear for _, first in self._seen):  # the layer begins again
            self._seen = []
        self._seen.append((x, linear))
        return linear
