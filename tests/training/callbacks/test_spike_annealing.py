"""k goes from its first to its last value geometrically and stays there."""

from __future__ import annotations

import pytest

from spikingbrain_train.config.model import SpikingConfig
from spikingbrain_train.config.run import SpikeAnnealingConfig
from spikingbrain_train.training.callbacks.spike_annealing import spike_k

SPIKING = SpikingConfig(k=3.0)


def test_k_shrinks_by_the_same_factor_every_step_until_it_is_final() -> None:
    annealing = SpikeAnnealingConfig(init_k=48.0, anneal_iters=4)
    values = [spike_k(annealing, SPIKING, iteration) for iteration in range(7)]
    assert values == pytest.approx([48.0, 24.0, 12.0, 6.0, 3.0, 3.0, 3.0])
    assert values[4:] == [3.0, 3.0, 3.0], "exactly the model's k from then on"


def test_without_annealing_k_is_the_models_from_the_first_step() -> None:
    assert spike_k(SpikeAnnealingConfig(), SPIKING, 0) == 3.0
