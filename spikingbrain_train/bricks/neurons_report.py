"""What is said of neurons: how unevenly they work, and what a model is without the weakest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spikingbrain_train.bricks.neuron_records import BINS, LOWEST, PER_DECADE, Histogram, NeuronRecords
from spikingbrain_train.reporting.tables import facts, table, terminal_width

_QUANTILES = (0.5, 0.9, 0.99, 0.999)
_LARGEST = (0.01, 0.1, 0.2, 0.3)


@dataclass(frozen=True)
class MaskedReading:
    """The text, read without the weakest neurons."""

    percent: float
    """Left out."""
    cross_entropy: float
    """Nats per token."""


@dataclass(frozen=True)
class NeuronsReport:
    """Everything that was measured."""

    model: str
    form: str
    dtype: str
    text: str
    windows: int
    seq_length: int
    cross_entropy: float
    """Of the whole model, nats per token."""
    records: NeuronRecords
    curve: Sequence[MaskedReading]

    def whole(self) -> tuple[Histogram, Histogram]:
        """Activations and output norms of all layers."""
        pair = Histogram(torch.device("cpu")), Histogram(torch.device("cpu"))
        for each in self.records.layers().values():
            pair[0].merge(each[0])
            pair[1].merge(each[1])
        return pair

    def as_json(self) -> dict[str, Any]:
        """Every number but those of single neurons."""
        activations, outputs = self.whole()
        return {
            "model": self.model,
            "form": self.form,
            "dtype": self.dtype,
            "text": self.text,
            "windows": self.windows,
            "seq_length": self.seq_length,
            "cross_entropy": self.cross_entropy,
            "perplexity": math.exp(self.cross_entropy),
            "masked": [
                {
                    "percent": each.percent,
                    "cross_entropy": each.cross_entropy,
                    "perplexity": math.exp(each.cross_entropy),
                }
                for each in self.curve
            ],
            "activation": _distribution(activations),
            "output_norm": _distribution(outputs),
            "layers": [
                {"layer": layer, "activation": _distribution(pair[0]), "output_norm": _distribution(pair[1])}
                for layer, pair in self.records.layers().items()
            ],
            "bins": [10 ** (LOWEST + index / PER_DECADE) for index in range(BINS)],
            "histograms": {"activation": activations.counts.tolist(), "output_norm": outputs.counts.tolist()},
        }

    def lines(self) -> list[str]:
        """The report for a terminal."""
        activations, outputs = self.whole()
        held = ", ".join(
            f"{100 * share:g} %: {100 * outputs.held_by_largest(share):.0f} %" for share in _LARGEST
        )
        lines = facts(
            [
                ("model", f"{self.model} ({self.form}, {self.dtype})"),
                ("text", f"{self.text}: {self.windows} windows of {self.seq_length} tokens"),
                ("held by", f"of all output norms, the largest {held}"),
            ],
            terminal_width(),
        )
        rows = [["layer", "mean |act|", *_names(), "mean norm", *_names()]]
        named = [(str(layer), pair) for layer, pair in self.records.layers().items()]
        for name, pair in [*named, ("all", (activations, outputs))]:
            cells = [[f"{each.mean:.3g}", *(f"{each.quantile(q):.3g}" for q in _QUANTILES)] for each in pair]
            rows.append([name, *cells[0], *cells[1]])
        lines += ["", *table(rows, 1)]
        rows = [["left out", "cross entropy", "perplexity", "of the whole model's"]]
        for each in self.curve:
            ratio = math.exp(each.cross_entropy - self.cross_entropy)
            rows.append(
                [
                    f"{each.percent:g} %",
                    f"{each.cross_entropy:.4f}",
                    f"{math.exp(each.cross_entropy):.3f}",
                    f"{ratio:.3f} x",
                ]
            )
        return [*lines, "", *table(rows, 1)] if self.curve else lines


def _names() -> list[str]:
    return [f"{100 * q:g} %" for q in _QUANTILES]


def _distribution(histogram: Histogram) -> dict[str, Any]:
    return {
        "mean": histogram.mean,
        "quantiles": {f"{q:g}": histogram.quantile(q) for q in _QUANTILES},
        "held_by_largest": {f"{share:g}": histogram.held_by_largest(share) for share in _LARGEST},
    }
