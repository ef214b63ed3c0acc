"""Spike encoding: what it is in front of, and how k gets to its final value."""

from __future__ import annotations

from spikingbrain_train.architecture.layers import mixers_of
from spikingbrain_train.config.model import ModelConfig, SpikingProjection
from spikingbrain_train.config.require import require
from spikingbrain_train.config.run import StageConfig


def check_spiking(model: ModelConfig, stage: StageConfig) -> None:
    """Encoded projections against the network, and the schedule of k. Raises ConfigurationError."""
    _check_projections(model)
    _check_annealing(model, stage)


def _check_projections(model: ModelConfig) -> None:
    has_gate = any("gate" in kind.input_projections(model) for kind in mixers_of(model))
    require(
        has_gate or SpikingProjection.gate not in model.spiking.projections,
        "model.spiking.projections lists gate, but no layer has a low-rank gate; take gate out of the list",
    )


def _check_annealing(model: ModelConfig, stage: StageConfig) -> None:
    annealing, k = stage.spike_annealing, model.spiking.k
    if annealing.init_k is None:
        require(
            annealing.anneal_iters == 0,
            f"stage.spike_annealing.anneal_iters={annealing.anneal_iters} needs "
            f"stage.spike_annealing.init_k, the k to start from, e.g. {8 * k:g}; without one set it to 0",
        )
        return
    require(
        len(model.spiking.projections) > 0,
        f"stage.spike_annealing.init_k={annealing.init_k} anneals spikes, but model.spiking.projections is "
        f"empty; name the projections that read spikes, or set it to null",
    )
    require(
        annealing.init_k > k,
        f"stage.spike_annealing.init_k={annealing.init_k} must be above model.spiking.k={k}: spikes start "
        f"fine and grow coarser; raise it, or set it to null for the same k throughout",
    )
    require(
        1 <= annealing.anneal_iters <= stage.train_iters,
        f"stage.spike_annealing.anneal_iters={annealing.anneal_iters} must be between 1 and "
        f"stage.train_iters={stage.train_iters}, so that k reaches model.spiking.k={k} within the stage",
    )
