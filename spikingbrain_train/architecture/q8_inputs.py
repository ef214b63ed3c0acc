"""INT8 inputs of projections with a scale for each block of neighbours, as llama.cpp rounds them: no torch.

Its CPU products of weights of few bits round their inputs to block types of ggml (ggml/src/ggml-quants.c):
Q8_K of 256 inputs for weights of TQ2_0, Q8_0 of 32 for Q2_0 and Q4_0. Which type ternary weights get in a
GGUF file follows from the width of their inputs alone (conversion/formats/gguf.py), and so does the block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from spikingbrain_train.architecture.annealed_quantization import AnnealedQuantizationKind
from spikingbrain_train.architecture.layers import alike, layers
from spikingbrain_train.architecture.linear_transforms import LINEAR_TRANSFORMS
from spikingbrain_train.architecture.weights import Split, Weight
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.require import divisors, either, require
from spikingbrain_train.config.stage import StageConfig

Q8_K, Q8_0 = 256, 32
"""Inputs of a block."""


def block_of(inputs: int) -> int:
    """How many neighbouring inputs of so many share a scale: blocks of 256 where they fit, else of 32."""
    return Q8_0 if inputs % Q8_K else Q8_K


class Q8InputsKind(AnnealedQuantizationKind):
    """The input of a projection as whole numbers from -127 to 127 times a scale for 256 or 32 neighbours."""

    name = "q8_inputs"
    transform = "spikingbrain_train.models.linears.q8_inputs:Q8Inputs"
    words = "reads INT8 inputs in llama.cpp's blocks"
    quantizes = "inputs"
    numbers = "INT8 numbers"
    changes_input = True
    export_module = "spikingbrain_train.hf.q8_inputs_spikingbrain"

    def projections(self, model: ModelConfig) -> Collection[str]:
        return model.q8_inputs.projections

    def check(self, model: ModelConfig, stage: StageConfig, present: Collection[str]) -> None:
        super().check(model, stage, present)
        for name, weight in self._weights(model):
            inputs = weight.shape[-1]
            require(
                inputs % Q8_0 == 0,
                f"model.q8_inputs.projections lists {name}, which reads {inputs} inputs, but blocks of "
                f"{Q8_0} do not divide them; take it out of the list",
            )

    def check_split(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """A block lies on one rank. Raises ConfigurationError."""
        for name, weight in self._weights(model):
            if weight.split_axis == 0 or weight.split not in (Split.tensor, Split.experts):
                continue  # every rank reads whole tokens
            of_experts = weight.split is Split.experts
            ranks = parallel.expert_tensor_size if of_experts else parallel.tensor_model_parallel_size
            setting = "expert_tensor_parallel_size" if of_experts else "tensor_model_parallel_size"
            inputs, block = weight.shape[-1], block_of(weight.shape[-1])
            require(
                inputs % (ranks * block) == 0,
                f"parallel.{setting}={ranks} gives a rank {inputs / ranks:g} of the {inputs} inputs of "
                f"{name}, which are no whole blocks of {block}, as model.q8_inputs.projections asks for; "
                f"valid is {either(divisors(inputs // block))}, or take {name} out of the list",
            )

    def _weights(self, model: ModelConfig) -> Iterator[tuple[str, Weight]]:
        """What it is applied to, and what that projects; weights of like layers once."""
        for layer, _ in alike(layers(model)) if self.projections(model) else ():
            for weight in layer.weights(model):
                if weight.projection is not None and self.applies(model, *weight.projection):
                    yield Projection(weight.projection[0]).name, weight

    def describe(self, model: ModelConfig) -> str:
        return f"INT8 inputs in llama.cpp's blocks of {self.names(model)}"


Q8_INPUTS = LINEAR_TRANSFORMS.register(Q8InputsKind())
