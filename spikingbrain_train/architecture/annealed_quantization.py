"""What the kinds have in common that put numbers of few values in the place of weights or inputs.

Training fades them in (``stage.quantization_annealing``): ``x + share * (quantised(x) - x)``, where the share
rises on a straight line from 0 to 1. Published recipes that start from a dense checkpoint do the same
(lambda in "Fine-tuning LLMs to 1.58bit", Hugging Face 2024); from scratch there is nothing to fade from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from spikingbrain_train.architecture.linear_transforms import (
    LINEAR_TRANSFORMS,
    LinearTransformKind,
    check_gate,
)
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.require import require
from spikingbrain_train.config.stage import StageConfig


class AnnealedQuantizationKind(LinearTransformKind):
    """A kind whose transforms have an attribute ``share``: how far they have gone."""

    numbers: str
    """What weights or inputs become: ``INT8 numbers``."""

    def check(self, model: ModelConfig, stage: StageConfig, present: Collection[str]) -> None:
        check_gate(self, model, present)
        anneal_iters = stage.quantization_annealing.anneal_iters
        annealed = [kind for kind in LINEAR_TRANSFORMS if isinstance(kind, AnnealedQuantizationKind)]
        names = [f"model.{kind.name}.projections" for kind in annealed]
        require(
            anneal_iters == 0 or any(kind.projections(model) for kind in annealed),
            f"stage.quantization_annealing.anneal_iters={anneal_iters} anneals quantised weights and inputs, "
            f"but {', '.join(names[:-1])} and {names[-1]} are empty; name the projections that have them, or "
            f"set it to 0",
        )
        require(
            anneal_iters == 0 or anneal_iters <= stage.train_iters,
            f"stage.quantization_annealing.anneal_iters={anneal_iters} must be at most "
            f"stage.train_iters={stage.train_iters}, so that weights and inputs are whole quantised numbers "
            f"within the stage",
        )

    def schedule(self, model: ModelConfig, stage: StageConfig, iteration: int) -> Mapping[str, float]:
        """How far weights or inputs have gone to what they become: on a straight line to 1."""
        return {"share": stage.quantization_annealing.share(iteration)}

    def ahead_of(self, model: ModelConfig, stage: StageConfig, iteration: int) -> str:
        share = self.schedule(model, stage, iteration)["share"]
        if share == 1.0:
            return ""
        remedy = "; --float-weights exports the parameters" if self.quantizes == "weights" else ""
        return (
            f"the checkpoint lies within stage.quantization_annealing, after {iteration} of "
            f"{stage.quantization_annealing.anneal_iters} steps: its {self.quantizes} were {share:.0%} of "
            f"the way to {self.numbers}, and the export has whole ones{remedy}"
        )

    def names(self, model: ModelConfig) -> str:
        """Its projections, for sentences."""
        return ", ".join(Projection(each).name for each in self.projections(model))
