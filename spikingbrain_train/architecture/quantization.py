"""INT8 weights, as the W8ASpike form has them (SpikingBrain, arXiv 2509.05276, section 3.3), without torch.

What multiplies by them, and how training gets there. Keys and values are the softmax mixers' own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from spikingbrain_train.architecture.layers import alike, has_experts, layers
from spikingbrain_train.architecture.linear_transforms import LINEAR_TRANSFORMS, LinearTransformKind
from spikingbrain_train.architecture.weights import Split, Weight
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.require import divisors, either, require
from spikingbrain_train.config.stage import StageConfig


class Int8WeightsKind(LinearTransformKind):
    """The weight of a projection as whole numbers from -127 to 127 times the scale of their group."""

    name = "quantization"
    transform = "spikingbrain_train.models.linears.int8_weights:Int8Weights"
    words = "multiplies by INT8 weights"
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
        quantized, anneal_iters = model.quantization.projections, stage.quantization_annealing.anneal_iters
        require(
            Projection.gate in present or Projection.gate not in quantized,
            "model.quantization.projections lists gate, but no layer has a low-rank gate or an output gate; "
            "take gate out of the list",
        )
        if quantized:
            _check_groups(model)
        require(
            not (model.quantization.stored_scales and has_experts(model)),
            "model.quantization.stored_scales=true is for dense feed-forwards, but layers have experts; set "
            "it to false, so that scales follow from the weights",
        )
        require(
            bool(quantized) or anneal_iters == 0,
            f"stage.quantization_annealing.anneal_iters={anneal_iters} anneals INT8 weights, but "
            f"model.quantization.projections is empty; name the projections that have them, or set it to 0",
        )
        require(
            anneal_iters == 0 or anneal_iters <= stage.train_iters,
            f"stage.quantization_annealing.anneal_iters={anneal_iters} must be at most "
            f"stage.train_iters={stage.train_iters}, so that weights are whole INT8 numbers within the stage",
        )

    def schedule(self, model: ModelConfig, stage: StageConfig, iteration: int) -> Mapping[str, float]:
        """How far weights have gone to what INT8 numbers hold: on a straight line to 1."""
        anneal_iters = stage.quantization_annealing.anneal_iters
        return {"share": min(1.0, iteration / anneal_iters) if anneal_iters else 1.0}

    def ahead_of(self, model: ModelConfig, stage: StageConfig, iteration: int) -> str:
        share = self.schedule(model, stage, iteration)["share"]
        if share == 1.0:
            return ""
        return (
            f"the checkpoint lies within stage.quantization_annealing, after {iteration} of "
            f"{stage.quantization_annealing.anneal_iters} steps: its weights were {share:.0%} of the way to "
            f"INT8 numbers, and the export multiplies by whole ones; --float-weights exports the parameters"
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
