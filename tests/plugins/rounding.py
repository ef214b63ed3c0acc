"""A linear transform from outside, torch-free part: weights rounded to multiples of a step, more and more.

The step is a share of the mean magnitude of the whole matrix, so a rank that holds a part has to ask others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from spikingbrain_train.architecture.linear_transforms import LINEAR_TRANSFORMS, LinearTransformKind
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.setting import FUNCTION, TRAINING, setting
from spikingbrain_train.config.stage import StageConfig


@dataclass
class RoundingConfig:
    """Weights as multiples of a step."""

    projections: list[Projection] = setting(default_factory=list, resume=FUNCTION)
    """Which projections multiply by rounded weights."""
    step: float = setting(0.5, above=0, resume=TRAINING)
    """The last step, in multiples of the mean magnitude of a weight matrix."""


class RoundedWeightsKind(LinearTransformKind):
    """Straight-through rounding of weights."""

    name = "rounding"
    section_type = RoundingConfig
    transform = "tests.plugins.rounding_module:RoundedWeights"
    words = "rounds weights"
    changes_weight = True
    export_module = "tests.plugins.rounding_export"

    def projections(self, model: ModelConfig) -> Collection[str]:
        return self.own_settings(model).projections

    def schedule(self, model: ModelConfig, stage: StageConfig, iteration: int) -> Mapping[str, float]:
        """The step grows from a tenth to all of it."""
        grown = min(1.0, 0.1 + iteration / stage.train_iters)
        return {"step": grown * self.own_settings(model).step}

    def describe(self, model: ModelConfig) -> str:
        names = ", ".join(Projection(each).name for each in self.projections(model))
        return f"weights of {names} rounded"


ROUNDED_WEIGHTS = LINEAR_TRANSFORMS.register(RoundedWeightsKind())
