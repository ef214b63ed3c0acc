"""Adaptive-threshold spikes in front of projections (SpikingBrain, arXiv 2509.05276, eq. 19-21).

What they are in front of, and how k gets to its final value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from spikingbrain_train.architecture.linear_transforms import (
    LINEAR_TRANSFORMS,
    LinearTransformKind,
    check_gate,
)
from spikingbrain_train.config.linear_transforms import GateEncoding, Projection
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.require import require
from spikingbrain_train.config.stage import StageConfig


class SpikesKind(LinearTransformKind):
    """The input of a projection as whole numbers of spikes."""

    name = "spiking"
    transform = "spikingbrain_train.models.linears.spikes:Spikes"
    words = "encodes activations as spikes"
    quantizes = "inputs"
    changes_input = True
    in_front = True
    hf_formats = ("gla_swa", "spikingbrain")

    def projections(self, model: ModelConfig) -> Collection[str]:
        return model.spiking.projections

    def applies(self, model: ModelConfig, projection: str, matrix: int = 0) -> bool:
        """A gate that is encoded once: its second matrix reads what the first made of spikes."""
        everywhere = model.spiking.gate_encoding is GateEncoding.each_matrix
        return super().applies(model, projection) and (matrix == 0 or everywhere)

    def settings(self, model: ModelConfig) -> set[str]:
        projections = model.spiking.projections
        present = {
            "spiking.projections": True,
            "spiking.k": bool(projections),
            "spiking.gate_encoding": Projection.gate in projections,
            "spiking.queries": False,  # of the softmax mixers
        }
        return {name for name in self.all_settings(model) if present[name]}

    def check(self, model: ModelConfig, stage: StageConfig, present: Collection[str]) -> None:
        check_gate(self, model, present)
        _check_annealing(model, stage)

    def schedule(self, model: ModelConfig, stage: StageConfig, iteration: int) -> Mapping[str, float]:
        """k falls geometrically until it reaches ``model.spiking.k``, where it stays.

        ``init_k * (k / init_k) ** (iteration / anneal_iters)``.
        """
        annealing, k = stage.spike_annealing, model.spiking.k
        if annealing.init_k is None or iteration >= annealing.anneal_iters:
            return {"k": k}
        return {"k": annealing.init_k * (k / annealing.init_k) ** (iteration / annealing.anneal_iters)}

    def describe(self, model: ModelConfig) -> str:
        each = model.spiking.gate_encoding is GateEncoding.each_matrix
        names = [
            f"{projection.name}{' (each matrix)' if each and projection is Projection.gate else ''}"
            for projection in model.spiking.projections
        ]
        return f"spikes with k {model.spiking.k:g} in front of {', '.join(names)}"

    def in_experts(self, model: ModelConfig) -> str | None:
        if super().in_experts(model) is None:
            return None
        asks = "mlp_fc1 and mlp_fc2 in model.spiking.projections"
        return f"encode spikes inside experts, which {asks} ask for"


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


SPIKES = LINEAR_TRANSFORMS.register(SpikesKind())
