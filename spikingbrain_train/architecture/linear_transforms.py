"""Which projections read a transformed input, without torch: spikes today."""

from __future__ import annotations

from spikingbrain_train.config.model import ModelConfig


def reads_spikes(model: ModelConfig, projection: str) -> bool:
    """Whether a projection keeps an encoded copy of its input for the backward pass."""
    return any(encoded.value == projection for encoded in model.spiking.projections)
