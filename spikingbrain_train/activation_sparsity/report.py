"""What an analysis says: as JSON, and as tables for a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.activation_sparsity.analysis import Fit, Reading
from spikingbrain_train.activation_sparsity.gate_records import GateRecords, LayerCounts
from spikingbrain_train.activation_sparsity.result_files import FITTED
from spikingbrain_train.reporting.tables import table

_BIN = 10
"""Percent of sparsity that a bin of the histogram is wide."""


@dataclass(frozen=True)
class Read:
    """What was read, and by what."""

    model: str
    given: str
    """How the command line names it."""
    form: str
    """Megatron or Hugging Face."""
    is_checkpoint: bool
    """Whether it is a Megatron checkpoint."""
    dtype: str
    text: str
    tokens: int
    windows: int
    seq_length: int


@dataclass(frozen=True)
class SparsityReport:
    """All that is written.

    Attributes:
        read: what was.
        own: the model as it is.
        curve: readings of the thresholds that were asked for or tried, by threshold.
        fit: None where none was asked for.
    """

    read: Read
    own: Reading
    curve: Sequence[Reading]
    fit: Fit | None

    def as_json(self) -> dict[str, Any]:
        """Every number, by names that say what it is."""
        tokens, own = self.read.tokens, self.own
        return {
            **{
                name: value
                for name, value in asdict(self.read).items()
                if name not in ("is_checkpoint", "given")
            },
            "threshold": own.threshold,
            "cross_entropy": own.cross_entropy,
            **_overall(own.records, tokens),
            "layers": [
                {"layer": layer, **_numbers(counts, tokens)} for layer, counts in own.records.layers().items()
            ],
            "histogram": [
                {"from": low / 100, "to": (low + _BIN) / 100, "layers": layers}
                for low, layers in _histogram(own.records)
            ],
            "thresholds": [
                {
                    "threshold": each.threshold,
                    "cross_entropy": each.cross_entropy,
                    **_overall(each.records, tokens),
                    "layers": [_share(counts) for counts in each.records.layers().values()],
                }
                for each in self.curve
            ],
            FITTED: None if self.fit is None else self.fit.threshold,
            "fit": None if self.fit is None else {**asdict(self.fit), "commands": self.commands()},
        }

    def lines(self) -> list[str]:
        """Tables for a terminal."""
        read, own = self.read, self.own
        overall = _overall(own.records, read.tokens)
        lines = [
            f"model          {read.model} ({read.form}, {read.dtype}), {_function(own.threshold)}",
            f"text           {read.text}",
            f"tokens         {read.tokens}, in windows of {read.seq_length}",
            f"cross entropy  {own.cross_entropy:.4f}",
            f"zeros          {overall['sparsity']:.2%} of all channels; {overall['active_per_token']:.1f} of "
            f"{overall['computed_per_token']:.0f} active at a token, all layers together",
            "",
            *table(self._layer_rows(), 1),
            "",
            "layers by sparsity",
            *(
                f"  {low:>3} to {low + _BIN:>3} %  {'#' * layers} {layers}"
                for low, layers in _histogram(own.records)
            ),
            "",
            *table(self._curve_rows(), 1),
        ]
        return [*lines, "", *self._fit_lines()] if self.fit is not None else lines

    def commands(self) -> list[str]:
        """What writes the model with the fitted threshold, as an export."""
        assert self.fit is not None
        model = str(Path(self.read.given))  # without a slash at its end
        target = f"{model}-fatrelu"
        commands, source = [], model
        if self.read.is_checkpoint:
            source = f"{target}-source"
            commands.append(["spikingbrain-export", "--checkpoint", model, "--output", source])
        settings = [
            "keep_mixers=true",
            "activation_func=fatrelu",
            f"fatrelu_threshold={self.fit.threshold:g}",
        ]
        words = ["spikingbrain-convert", "import", "--hf", source, "--output", f"{target}-checkpoint"]
        commands.append([*words, "--conversion", "prosparse", *settings])
        words = ["spikingbrain-export", "--checkpoint", f"{target}-checkpoint", "--output", target]
        commands.append(words)
        return [shlex.join(each) for each in commands]

    def _layer_rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [
            ("layer", "channels", "zeros", "active at a token", "never active", "always active")
        ]
        for layer, counts in self.own.records.layers().items():
            numbers = _numbers(counts, self.read.tokens)
            rows.append(
                (
                    str(layer),
                    str(counts.channels),
                    f"{numbers['sparsity']:.2%}",
                    f"{numbers['active_per_token']:.1f}",
                    str(counts.never_active),
                    str(counts.always_active),
                )
            )
        return rows

    def _curve_rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("threshold", "zeros", "active at a token", "cross entropy", "above")]
        for each in self.curve:
            overall = _overall(each.records, self.read.tokens)
            rows.append(
                (
                    f"{each.threshold:g}",
                    f"{overall['sparsity']:.2%}",
                    f"{overall['active_per_token']:.1f}",
                    f"{each.cross_entropy:.4f}",
                    f"{each.cross_entropy - self.own.cross_entropy:+.4f}",
                )
            )
        return rows

    def _fit_lines(self) -> list[str]:
        fit = self.fit
        assert fit is not None
        beyond = "none that was tried costs more" if fit.refused is None else f"{fit.refused:g} costs more"
        if fit.threshold == self.own.threshold:
            return [
                f"no threshold above the model's own {self.own.threshold:g} stays within "
                f"{fit.loss_budget:g} nats; {beyond}"
            ]
        reading = next(each for each in self.curve if each.threshold == fit.threshold)
        return [
            f"threshold {fit.threshold:g} stays within {fit.loss_budget:g} nats ({beyond}): "
            f"{self.own.records.sparsity:.2%} -> {reading.records.sparsity:.2%} zeros, cross entropy "
            f"{reading.cross_entropy - self.own.cross_entropy:+.4f}; a folder with it is written by",
            *(f"  {command}" for command in self.commands()),
        ]


def _function(threshold: float) -> str:
    return "relu" if threshold == 0 else f"fatrelu {threshold:g}"


def _share(counts: LayerCounts) -> float:
    return 1 - counts.active / counts.computed if counts.computed else float("nan")


def _numbers(counts: LayerCounts, tokens: int) -> dict[str, Any]:
    return {
        "channels": counts.channels,
        "sparsity": _share(counts),
        "active_per_token": counts.active / tokens,
        "computed_per_token": counts.computed / tokens,
        "never_active": counts.never_active,
        "always_active": counts.always_active,
    }


def _overall(records: GateRecords, tokens: int) -> dict[str, Any]:
    return _numbers(LayerCounts(*map(sum, zip(*records.layers().values(), strict=True))), tokens)


def _histogram(records: GateRecords) -> list[tuple[int, int]]:
    """Lower ends of bins in percent and layers in each, from the first to the last that has some."""
    bins = [
        min(int(100 * _share(each)), 99) // _BIN * _BIN for each in records.layers().values() if each.computed
    ]
    return [(low, bins.count(low)) for low in range(min(bins), max(bins) + 1, _BIN)]
