"""INT8 inputs of projections, with a scale for each token (BitNet b1.58, arXiv 2402.17764, section 2)."""

from __future__ import annotations

from collections.abc import Collection

from spikingbrain_train.architecture.annealed_quantization import AnnealedQuantizationKind
from spikingbrain_train.architecture.linear_transforms import LINEAR_TRANSFORMS
from spikingbrain_train.config.model import ModelConfig


class Int8InputsKind(AnnealedQuantizationKind):
    """The input of a projection as whole numbers from -127 to 127 times max |x| / 127 of its token."""

    name = "int8_inputs"
    transform = "spikingbrain_train.models.linears.int8_inputs:Int8Inputs"
    words = "reads INT8 inputs"
    quantizes = "inputs"
    numbers = "INT8 numbers"
    changes_input = True
    export_module = "spikingbrain_train.hf.int8_inputs_spikingbrain"

    def projections(self, model: ModelConfig) -> Collection[str]:
        return model.int8_inputs.projections

    def describe(self, model: ModelConfig) -> str:
        return f"INT8 inputs of {self.names(model)}"


INT8_INPUTS = LINEAR_TRANSFORMS.register(Int8InputsKind())
