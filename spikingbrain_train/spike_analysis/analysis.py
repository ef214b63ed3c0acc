"""Counting: a model reads text without spikes, and with spikes of every k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spikingbrain_train.evaluation.text_windows import cross_entropy_of
from spikingbrain_train.spike_analysis.linear_records import Records
from spikingbrain_train.spike_analysis.spiking_model import SpikingModel


@dataclass(frozen=True)
class Reading:
    """A model that has read all of the text with spikes of one k."""

    k: float
    cross_entropy: float
    """Nats per token."""
    records: Records


@dataclass(frozen=True)
class Analysis:
    """All readings of one text."""

    without_spikes: float
    """Cross entropy, nats per token."""
    readings: Sequence[Reading]
    """By k."""

    def of(self, k: float) -> Reading:
        """The reading with that k."""
        return next(each for each in self.readings if each.k == k)


def analyse(model: SpikingModel, windows: Sequence[Sequence[int]], ks: Sequence[float]) -> Analysis:
    """Read the text once for every k and once without; on several ranks all call it together.

    Args:
        model: any form.
        windows: token ids of each text, of one length; the last of each is predicted only.
        ks: at least one.
    """
    with model.no_spikes():
        without = cross_entropy_of(model.language_model, windows, "reading without spikes")
    readings = []
    for k in sorted(set(ks)):
        with model.spikes(k) as records:
            cross_entropy = cross_entropy_of(model.language_model, windows, f"reading with k {k:g}")
        readings.append(Reading(k, cross_entropy, model.gathered(records)))
    return Analysis(without, readings)
