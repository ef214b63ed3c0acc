"""From counts to numbers: shares, sparsities, energies, of one linear or of many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from spikingbrain_train.spike_analysis.linear_records import Linear, LinearRecord, Records
from spikingbrain_train.spiking.codings import CODINGS
from spikingbrain_train.spiking.count_distribution import CountDistribution, OfCoding
from spikingbrain_train.spiking.energy import EnergyModel


@dataclass(frozen=True)
class CodingNumbers(OfCoding):
    """What a coding sends of some counts, and what that costs."""

    energy_pj: float | None
    """Of a multiply-accumulate; None where the coding does not hold all counts."""
    saving_fp16: float | None
    """Share of an FP16 multiply-accumulate's energy that is saved."""
    saving_int8: float | None
    """The same of INT8."""


@dataclass(frozen=True)
class Numbers:
    """Of some linears together.

    Every distinct input counts once, however many linears read it; energies are means over
    multiply-accumulates, so a linear weighs in them with its outputs.
    """

    counts: int
    """Channels of tokens."""
    channels: int
    share_up_to_7: float
    """Of |s_int| <= 7."""
    silent: float
    """Share of s_int = 0."""
    silent_channels: float
    """Share of the channels that send no spike at any token."""
    mean_spikes: float
    """Of a channel and token, in the bitwise ternary coding (SpikingBrain, arXiv 2509.05276, section 5.5)."""
    least: int
    """The smallest count; the outermost bins take in what lies beyond +-4095."""
    occurrences: list[int]
    """Of each count from the smallest to the largest."""
    codings: dict[str, CodingNumbers]

    def as_json(self) -> dict[str, Any]:
        """Plain values, NaN as null."""
        return {name: _plain(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class LayerNumbers:
    """Of one layer."""

    layer: int
    overall: Numbers
    projections: dict[str, Numbers]


@dataclass(frozen=True)
class ModelNumbers:
    """Of a whole model at one k."""

    overall: Numbers
    projections: dict[str, Numbers]
    """By projection, all layers together."""
    layers: list[LayerNumbers]


def numbers_of_model(records: Records, window: int, energy: EnergyModel) -> ModelNumbers:
    """Everything that is reported of one reading.

    Args:
        records: of all ranks.
        window: steps that a sparsity is of.
        energy: of single operations.
    """

    def of(linears: Iterable[Linear]) -> Numbers:
        return numbers_of(records, list(linears), window, energy)

    everything = list(records.linears)
    projections = list(dict.fromkeys(each.projection for each in everything))
    layers = []
    for layer in dict.fromkeys(each.layer for each in everything):
        inside = [each for each in everything if each.layer == layer]
        layers.append(LayerNumbers(layer, of(inside), {each.projection: of([each]) for each in inside}))
    return ModelNumbers(
        of(everything),
        {name: of(each for each in everything if each.projection == name) for name in projections},
        layers,
    )


def numbers_of(records: Records, linears: Sequence[Linear], window: int, energy: EnergyModel) -> Numbers:
    """Those of some linears; see :func:`numbers_of_model`."""
    inputs = dict.fromkeys(records.shared.get(each, each) for each in linears)
    found = [records.linears[each] for each in inputs]
    whole = CountDistribution()
    for record in found:
        whole.histogram += record.distribution.histogram
    channels = torch.cat([record.spikes_of_channel for record in found])
    low, occurrences = whole.occurrences()
    of_linears = [records.linears[each] for each in linears]
    return Numbers(
        counts=whole.total,
        channels=len(channels),
        share_up_to_7=whole.share_up_to(7),
        silent=whole.share_up_to(0),
        silent_channels=float((channels == 0).double().mean()),
        mean_spikes=whole.mean_spikes(),
        least=low,
        occurrences=occurrences,
        codings={name: _of_coding(name, whole, of_linears, window, energy) for name in CODINGS},
    )


def _of_coding(
    name: str, whole: CountDistribution, linears: Sequence[LinearRecord], window: int, energy: EnergyModel
) -> CodingNumbers:
    sent = whole.of(CODINGS[name], window)
    spikes: float | None = None
    if sent.steps is not None:
        counted = [record for record in linears if record.distribution.total]
        operations = [record.distribution.total * record.outputs for record in counted]
        means = [record.distribution.mean_spikes(CODINGS[name], sent.steps) for record in counted]
        total = sum(mean * number for mean, number in zip(means, operations, strict=True))
        spikes = total / sum(operations) if operations else float("nan")
    return CodingNumbers(
        **asdict(sent),
        energy_pj=None if spikes is None else energy.of_spikes(spikes),
        saving_fp16=None if spikes is None else energy.saving(spikes, energy.fp16_mac),
        saving_int8=None if spikes is None else energy.saving(spikes, energy.int8_mac),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return None if isinstance(value, float) and value != value else value
