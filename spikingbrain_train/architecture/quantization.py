"""INT8 weights, as the W8ASpike form has them (SpikingBrain, arXiv 2509.05276, section 3.3), without torch.

What multiplies by them. Keys and values are the softmax mixers' own.
"""

from __future__ import annotations

from collections.abc import Collection

from spikingbrain_train.architecture.annealed_quantization import AnnealedQuantizationKind
from spikingbrain_train.architecture.layers import alike, has_experts, layers
from spikingbrain_train.architecture.linear_transforms import LINEAR_TRANSFORMS
from spikingbrain_train.architecture.weights import Split, Weight
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.require import divisors, either, require
from spikingbrain_train.config.stage import StageConfig


class Int8WeightsKind(AnnealedQuantizationKind):
    """The weight of a projection as whole numbers from -127 to 127 times the scale of their group."""

    name = "quantization"
    transform = "spikingbrain_train.models.linears.int8_weights:Int8Weights"
    words = "multiplies by INT8 weights"
    quantizes = "weights"
    numbers = "INT8 numbers"
    changes_weight = True
    hf_formats = ("gla_swa", "spikingbrain")

    def projections(self, model: ModelConfig) -> Collection[str]:
        return model.quantization.projections

    def settings(self, model: ModelConfig) -> set[str]:
        read = {"quantization.projections"}
        of_weights = {"quantization.group_size", "quantization.stored_scales"}
        return read | (of_weights if model.quantization.projections else set())

    def holder(self, model: ModelConfig) -> str | None:
        stored = model.quantization.stored_scales
        return "spikingbrain_train.models.linears.stored_scales:with_stored_scales" if stored else None

    def stored_beside(self, model: ModelConfig, weight: Weight) -> tuple[Weight, ...]:
        """Scales of the weight of a projection, one a row and group."""
        if weight.projection is None or not model.quantization.stored_scales:
            return ()
        shapes = []
        for rows, inputs in weight.shapes:
            shapes.append((rows, inputs // min(model.quantization.group_size, inputs), 1))
        scales = Weight(
            f"{weight.name}_scales",
            tuple(f"{role}_scales" for role in weight.roles),
            tuple(shapes),
            "scales of INT8 weights",
            Split.none,
            layout=weight.layout,
            is_trained=False,
        )
        return (scales,)

    def check(self, model: ModelConfig, stage: StageConfig, present: Collection[str]) -> None:
        super().check(model, stage, present)
        if model.quantization.projections:
            _check_groups(model)
        require(
            not (model.quantization.stored_scales and has_experts(model)),
            "model.quantization.stored_scales=true is for dense feed-forwards, but layers have experts; set "
            "it to false, so that scales follow from the weights",
        )

    def describe(self, model: ModelConfig) -> str:
        names = ", ".join(Projection(each).name for each in self.projections(model))
        stored = " with stored scales" if model.quantization.stored_scales else ""
        return f"INT8 weights in groups of {model.quantization.group_size}{stored} in {names}"


def _check_groups(model: ModelConfig) -> None:
    """Groups divide the input of every projection that is wider than one."""
    size = model.quantization.group_size
    widths = {
        (weight.projection[0], weight.shape[-1])
        for layer, _ in alike(layers(model))
        for weight in layer.weights(model)
        if weight.projection is not None
        and (weight.projection[0] in model.quantization.projections or model.quantization.stored_scales)
    }
    wide = [(name, width) for name, width in sorted(widths) if width > size]
    for name, width in wide:
        common = [each for each in divisors(width) if all(other % each == 0 for _, other in wide)]
        require(
            width % size == 0,
            f"model.quantization.group_size={size} does not divide the {width} inputs of "
            f"{Projection(name).name}; what divides those of all projections is {either(common)}",
        )


INT8_WEIGHTS = LINEAR_TRANSFORMS.register(Int8WeightsKind())
