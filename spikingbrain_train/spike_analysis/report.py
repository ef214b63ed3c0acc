"""What an analysis says: as JSON, and as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from spikingbrain_train.reporting.tables import table
from spikingbrain_train.spike_analysis.analysis import Analysis
from spikingbrain_train.spike_analysis.linear_records import Linear, Records
from spikingbrain_train.spike_analysis.numbers import ModelNumbers, Numbers, numbers_of, numbers_of_model
from spikingbrain_train.spike_analysis.published import PUBLISHED
from spikingbrain_train.spiking.count_distribution import PAPER_CODING
from spikingbrain_train.spiking.energy import EnergyModel

_CODING = PAPER_CODING.name


@dataclass(frozen=True)
class Read:
    """What was read, and by what."""

    model: str
    form: str
    """Megatron or Hugging Face."""
    dtype: str
    trained_k: float | None
    """k of the spikes that the model was trained with."""
    text: str
    tokens: int
    windows: int
    seq_length: int


@dataclass(frozen=True)
class SweepRow:
    """One k."""

    k: float
    cross_entropy: float
    overall: Numbers


@dataclass(frozen=True)
class Raster:
    """Counts of a few tokens and channels of one input."""

    layer: int
    projection: str
    counts: list[list[int]]
    """[tokens][channels]."""

    @property
    def name(self) -> str:
        """For a heading."""
        return f"layer {self.layer}, {self.projection}" if self.layer >= 0 else self.projection


@dataclass(frozen=True)
class SpikeReport:
    """All that is written."""

    read: Read
    k: float
    window: int
    energy: EnergyModel
    without_spikes: float
    cross_entropy: float
    numbers: ModelNumbers
    sweep: list[SweepRow]
    rasters: list[Raster]
    shared_inputs: dict[str, str]
    """Linears that read what another reads, and which."""

    @classmethod
    def of(cls, read: Read, analysis: Analysis, k: float, window: int, energy: EnergyModel) -> SpikeReport:
        """Work it out.

        Args:
            read: what was.
            analysis: with a reading of ``k``.
            k: that everything but the sweep is of.
            window: steps that sparsities are of.
            energy: of single operations.
        """
        reading = analysis.of(k)
        sweep = [
            SweepRow(
                each.k,
                each.cross_entropy,
                numbers_of(each.records, list(each.records.linears), window, energy),
            )
            for each in analysis.readings
        ]
        shared = {_name(linear): _name(first) for linear, first in reading.records.shared.items()}
        return cls(
            read,
            k,
            window,
            energy,
            analysis.without_spikes,
            reading.cross_entropy,
            numbers_of_model(reading.records, window, energy),
            sweep,
            _rasters(reading.records),
            shared,
        )

    def as_json(self) -> dict[str, Any]:
        """Every number, by names that say what it is."""
        numbers = self.numbers
        return {
            **asdict(self.read),
            "k": self.k,
            "window": self.window,
            "energy_model_pj": asdict(self.energy),
            "cross_entropy": {"without_spikes": self.without_spikes, "with_spikes": self.cross_entropy},
            "overall": numbers.overall.as_json(),
            "projections": {name: each.as_json() for name, each in numbers.projections.items()},
            "layers": [
                {
                    "layer": each.layer,
                    "overall": each.overall.as_json(),
                    "projections": {name: of.as_json() for name, of in each.projections.items()},
                }
                for each in numbers.layers
            ],
            "shared_inputs": self.shared_inputs,
            "sweep": [
                {
                    "k": row.k,
                    "cross_entropy": row.cross_entropy,
                    **{n: v for n, v in row.overall.as_json().items() if n not in ("least", "occurrences")},
                    "published": _published(row.k),
                }
                for row in self.sweep
            ],
            "rasters": [asdict(each) for each in self.rasters],
        }

    def lines(self) -> list[str]:
        """Tables for a terminal."""
        read, overall = self.read, self.numbers.overall
        trained = "without spikes" if read.trained_k is None else f"with k {read.trained_k:g}"
        lines = [
            f"model          {read.model} ({read.form}, {read.dtype}), trained {trained}",
            f"text           {read.text}",
            f"tokens         {read.tokens}, in windows of {read.seq_length}",
            f"k              {self.k:g}",
            f"cross entropy  {self.cross_entropy:.4f}, without spikes {self.without_spikes:.4f}",
            f"channels       {overall.silent:.1%} silent, {overall.share_up_to_7:.1%} count up to 7, "
            f"{overall.mean_spikes:.3f} spikes on average, {overall.silent_channels:.1%} silent throughout",
        ]
        return [
            *lines,
            "",
            f"sparsity of the first {self.window} steps, energy of a multiply-accumulate "
            f"(FP16 {self.energy.fp16_mac:g} pJ, INT8 {self.energy.int8_mac:g} pJ)",
            *table(coding_rows(overall), 1),
            "",
            *table(numbers_rows("projection", list(self.numbers.projections.items())), 1),
            "",
            *table(
                numbers_rows(
                    "layer", [(layer_name(each.layer), each.overall) for each in self.numbers.layers]
                ),
                1,
            ),
            "",
            *table(sweep_rows(self), 1),
        ]


def coding_rows(numbers: Numbers) -> list[tuple[str, ...]]:
    """A header and a row for each coding."""
    rows: list[tuple[str, ...]] = [
        ("coding", "carried", "sparsity", "steps of all", "spikes", "pJ", "vs FP16", "vs INT8")
    ]
    for name, each in numbers.codings.items():
        rows.append(
            (
                name.replace("_", " "),
                _percent(each.carried),
                _percent(each.sparsity),
                "-" if each.steps is None else str(each.steps),
                "-" if each.mean_spikes is None else f"{each.mean_spikes:.3f}",
                "-" if each.energy_pj is None else f"{each.energy_pj:.4f}",
                _saving(each.saving_fp16),
                _saving(each.saving_int8),
            )
        )
    return rows


def numbers_rows(what: str, of: Sequence[tuple[str, Numbers]]) -> list[tuple[str, ...]]:
    """A header and a row for each of some numbers."""
    rows: list[tuple[str, ...]] = [
        (what, "channels", "silent", "<= 7", "spikes", "sparsity", "never spike", "pJ")
    ]
    for name, each in of:
        coding = each.codings[_CODING]
        rows.append(
            (
                name,
                str(each.channels),
                _percent(each.silent),
                _percent(each.share_up_to_7),
                f"{each.mean_spikes:.3f}",
                _percent(coding.sparsity),
                _percent(each.silent_channels),
                "-" if coding.energy_pj is None else f"{coding.energy_pj:.4f}",
            )
        )
    return rows


def sweep_rows(report: SpikeReport) -> list[tuple[str, ...]]:
    """A header and a row for each k, the paper's numbers beside them."""
    rows: list[tuple[str, ...]] = [
        ("k", "cross entropy", "above none", "sparsity", "<= 7", "spikes", "paper: sparsity", "<= 7")
    ]
    for row in report.sweep:
        published = PUBLISHED.get(row.k)
        rows.append(
            (
                f"{row.k:g}",
                f"{row.cross_entropy:.4f}",
                f"{row.cross_entropy - report.without_spikes:+.4f}",
                _percent(row.overall.codings[_CODING].sparsity),
                _percent(row.overall.share_up_to_7),
                f"{row.overall.mean_spikes:.3f}",
                "-" if published is None else _percent(published[1]),
                "-" if published is None else _percent(published[0]),
            )
        )
    return rows


def layer_name(layer: int) -> str:
    """Its number; what lies in no layer is the rest."""
    return str(layer) if layer >= 0 else "outside of layers"


def _rasters(records: Records) -> list[Raster]:
    """Every distinct input of the layer in the middle."""
    layers = sorted({each.layer for each in records.linears if each.layer >= 0})
    middle = layers[len(layers) // 2] if layers else -1
    found = []
    for linear, record in records.linears.items():
        if linear.layer == middle and linear not in records.shared and record.patch is not None:
            found.append(Raster(linear.layer, linear.projection, record.patch.tolist()))
    return found


def _published(k: float) -> dict[str, float] | None:
    found = PUBLISHED.get(k)
    return None if found is None else {"share_up_to_7": found[0], "sparsity": found[1]}


def _name(linear: Linear) -> str:
    return f"{linear.layer}.{linear.projection}" if linear.layer >= 0 else linear.projection


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _saving(saved: float | None) -> str:
    return "-" if saved is None else f"{-saved:+.1%}"
