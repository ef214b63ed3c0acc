"""The schedule of the spike threshold: coarser spikes step by step, and the same ones after a resume."""

from __future__ import annotations

from spikingbrain_train.config.model import SpikingConfig
from spikingbrain_train.config.run import SpikeAnnealingConfig


def spike_k(annealing: SpikeAnnealingConfig, spiking: SpikingConfig, iteration: int) -> float:
    """k of the step that follows ``iteration`` finished ones, and of an evaluation between them.

    ``init_k * (k / init_k) ** (iteration / anneal_iters)`` until k reaches ``model.spiking.k``, where it
    stays. It depends on nothing else, so a resumed run repeats the uninterrupted one.
    """
    if annealing.init_k is None or iteration >= annealing.anneal_iters:
        return spiking.k
    return annealing.init_k * (spiking.k / annealing.init_k) ** (iteration / annealing.anneal_iters)
