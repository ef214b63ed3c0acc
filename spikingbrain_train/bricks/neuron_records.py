"""What is kept of every neuron while a model reads text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spikingbrain_train.activation_sparsity.gate_records import Part
from spikingbrain_train.bricks.neuron_model import FeedForward

LOWEST, DECADES, PER_DECADE = -7.0, 11, 20
"""Histograms of magnitudes: from 10**LOWEST over so many decades; what is smaller is in the first bin, zeros
too, and what is larger in the last."""
BINS = DECADES * PER_DECADE


class Histogram:
    """Magnitudes of one sort, each at some token.

    Attributes:
        counts: [BINS] float64.
        sums: [BINS] float64, of the magnitudes in each bin.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64, device=device)
        self.sums = torch.zeros(BINS, dtype=torch.float64, device=device)

    def add(self, values: Tensor, weight: float = 1.0) -> None:
        """Count magnitudes of any shape, each ``weight`` times."""
        flat = values.flatten().float()
        bins = ((flat.log10() - LOWEST) * PER_DECADE).clamp(0, BINS - 1).to(torch.int64)
        self.counts += weight * torch.bincount(bins, minlength=BINS)
        self.sums += weight * torch.bincount(bins, weights=flat.double(), minlength=BINS)

    def merge(self, other: Histogram) -> None:
        """Take in another's."""
        self.counts += other.counts.to(self.counts.device)
        self.sums += other.sums.to(self.sums.device)

    def quantile(self, share: float) -> float:
        """The magnitude below which that share lies, to the width of a bin (12 %)."""
        cumulative = self.counts.cumsum(0)
        index = int(torch.searchsorted(cumulative, share * float(cumulative[-1])))
        return float(10 ** (LOWEST + (min(index, BINS - 1) + 0.5) / PER_DECADE))

    def held_by_largest(self, share: float) -> float:
        """Of the sum of all magnitudes, what the largest ``share`` of them hold."""
        counts, sums = self.counts.flip(0), self.sums.flip(0)
        wanted, cumulative = share * float(counts.sum()), counts.cumsum(0)
        whole = cumulative <= wanted
        held = float(sums[whole].sum())
        first = int(whole.sum())
        if first < BINS and counts[first] > 0:  # a part of the bin on the edge
            before = float(cumulative[first - 1]) if first else 0.0
            held += float(sums[first]) * (wanted - before) / float(counts[first])
        return held / max(float(sums.sum()), 1e-300)

    @property
    def mean(self) -> float:
        """Of all magnitudes."""
        return float(self.sums.sum()) / max(float(self.counts.sum()), 1.0)


class NeuronRecord:
    """Of the channels of one feed-forward that a rank holds.

    Attributes:
        tokens: that went through.
        activation: [F] float64 sum of magnitudes of activations.
        output: [F] float64 sum of output norms.
        activations, outputs: histograms of the same.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.tokens = 0
        self.activation = torch.zeros(channels, dtype=torch.float64, device=device)
        self.output = torch.zeros_like(self.activation)
        self.activations, self.outputs = Histogram(device), Histogram(device)

    def merge(self, other: NeuronRecord) -> None:
        """Take in the same channels' of another rank, which read other tokens."""
        self.tokens += other.tokens
        self.activation += other.activation.cpu()
        self.output += other.output.cpu()
        self.activations.merge(other.activations)
        self.outputs.merge(other.outputs)


@dataclass
class NeuronRecords:
    """Of all feed-forwards."""

    parts: dict[Part, NeuronRecord] = field(default_factory=dict)

    @torch.no_grad()
    def watch(self, feed_forward: FeedForward, inside: Tensor) -> None:
        """A :data:`~.neuron_model.Change` that counts and changes nothing."""
        inside_NF = inside.reshape(-1, inside.shape[-1])
        record = self.parts.get(feed_forward.part)
        if record is None:
            record = NeuronRecord(inside.shape[-1], inside.device)
            self.parts[feed_forward.part] = record
        magnitudes, norms = inside_NF.float().abs(), feed_forward.output_norms(inside_NF)
        record.tokens += len(inside_NF)
        record.activation += magnitudes.sum(0, dtype=torch.float64)
        record.output += norms.sum(0, dtype=torch.float64)
        record.activations.add(magnitudes, 1 / feed_forward.copies)
        record.outputs.add(norms, 1 / feed_forward.copies)

    @classmethod
    def merged(cls, ranks: Sequence[NeuronRecords]) -> NeuronRecords:
        """Those of all ranks, on the CPU, in the order of their parts."""
        whole: dict[Part, NeuronRecord] = {}
        for records in ranks:
            for part, record in records.parts.items():
                into = whole.get(part)
                if into is None:
                    into = whole[part] = NeuronRecord(len(record.output), torch.device("cpu"))
                into.merge(record)
        return cls({part: whole[part] for part in sorted(whole)})

    def layers(self) -> dict[int, tuple[Histogram, Histogram]]:
        """Histograms of activations and of output norms by layer."""
        found: dict[int, tuple[Histogram, Histogram]] = {}
        for part, record in self.parts.items():
            pair = found.setdefault(
                part.layer, (Histogram(torch.device("cpu")), Histogram(torch.device("cpu")))
            )
            pair[0].merge(record.activations)
            pair[1].merge(record.outputs)
        return found

    def means(self) -> dict[str, Tensor]:
        """``layers.<n>.<feed-forward>.activation`` and ``.output_norm`` -> [channels] float32 means."""
        parts: dict[str, list[Tensor]] = {}
        for part, record in self.parts.items():
            for name, sums in (("activation", record.activation), ("output_norm", record.output)):
                mean = (sums / max(record.tokens, 1)).float()
                parts.setdefault(f"layers.{part.layer}.{part.name}.{name}", []).append(mean)
        return {name: torch.cat(each) for name, each in parts.items()}
