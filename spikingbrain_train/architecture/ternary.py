"""Ternary weights, without torch (BitNet b1.58, arXiv 2402.17764, eq. 1-3; 2504.12285, section 2)."""

from __future__ import annotations

from collections.abc import Collection

from spikingbrain_train.architecture.annealed_quantization import AnnealedQuantizationKind
from spikingbrain_train.architecture.linear_transforms import LINEAR_TRANSFORMS
from spikingbrain_train.config.model import ModelConfig


class TernaryWeightsKind(AnnealedQuantizationKind):
    """The weight of a projection as -1, 0 and 1 times the mean magnitude of its matrix."""

    name = "ternary"
    transform = "spikingbrain_train.models.linears.ternary_weights:TernaryWeights"
    words = "multiplies by ternary weights"
    quantizes = "weights"
    numbers = "ternary numbers"
    changes_weight = True
    export_module = "spikingbrain_train.hf.ternary_spikingbrain"

    def projections(self, model: ModelConfig) -> Collection[str]:
        return model.ternary.projections

    def describe(self, model: ModelConfig) -> str:
        return f"ternary weights in {self.names(model)}"


TERNARY_WEIGHTS = LINEAR_TRANSFORMS.register(TernaryWeightsKind())
