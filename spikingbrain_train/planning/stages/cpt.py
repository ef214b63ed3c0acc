"""Continual pretraining: all parameters on next-token loss (SpikingBrain, arXiv 2509.05276, section 3.4).

The dense source's logits to learn from, where a run asks for them, are this project's own.
"""

from __future__ import annotations

from spikingbrain_train.architecture.layers import dense_source
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig, StageConfig
from spikingbrain_train.config.setting import leaves
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.planning.activations import activation_bytes
from spikingbrain_train.planning.costs import (
    forward_flops_per_token,
    stage_parameters,
    stage_routed_expert_parameters,
    total_parameters,
)
from spikingbrain_train.planning.stages.kind import StageKind


class ContinualPretrainingKind(StageKind):
    """``stage.kind=cpt``."""

    name = "cpt"
    trained_by = "spikingbrain_train.training.stages.pretraining:ContinualPretraining"
    sees_sinks = True

    def describe(self, config: RunConfig) -> str:
        """What is learnt, and from whom."""
        stage = config.stage
        distils = ""
        if self.needs_teacher(stage):
            distils = f", {stage.distillation.weight:.0%} of the loss from the logits of {stage.teacher}"
        return f"{self.name}: all parameters learn to predict the next token{distils}"

    def reason_for_teacher(self, stage: StageConfig) -> str | None:
        """Distillation."""
        weight = stage.distillation.weight
        return f"stage.distillation.weight={weight}" if weight > 0 else None

    def all_settings(self, stage: StageConfig) -> set[str]:
        """Those of distillation."""
        return set(leaves(stage.distillation, "stage.distillation."))

    def settings(self, stage: StageConfig) -> set[str]:
        """Without a weight there is no distillation."""
        distils = stage.distillation.weight > 0
        return self.all_settings(stage) if distils else {"stage.distillation.weight"}

    def check(self, stage: StageConfig) -> None:
        """Nothing beyond what holds in every stage."""

    def check_teacher(
        self, model: ModelConfig, teacher: ModelConfig, parallel: ParallelConfig, setting: str
    ) -> None:
        """Logits are comparable over one vocabulary only. Raises CheckpointError."""
        if teacher.vocab_size != model.vocab_size:
            raise CheckpointError(
                f"{setting} has a vocabulary of {teacher.vocab_size}, but model.vocab_size="
                f"{model.vocab_size}; distillation needs a teacher with the same tokenizer"
            )

    def trainable_parameters(self, config: RunConfig, pipeline_stage: int) -> tuple[int, int]:
        """All of them."""
        experts = stage_routed_expert_parameters(config.model, config.parallel, pipeline_stage)
        return experts, stage_parameters(config.model, config.parallel, pipeline_stage) - experts

    def trainable_parameters_in_all(self, model: ModelConfig) -> int:
        """All of them."""
        return total_parameters(model)

    def flops_per_token(self, config: RunConfig) -> float:
        """Forward and backward: 3 x forward, about 6 N plus attention.

        With distillation the teacher's forward comes on top.
        """
        model, stage = config.model, config.stage
        flops = 3 * forward_flops_per_token(model, stage.seq_length)
        if self.needs_teacher(stage):
            flops += forward_flops_per_token(dense_source(model), stage.seq_length)
        return flops

    def activation_bytes(self, config: RunConfig, pipeline_stage: int, micro_batches: int) -> float:
        """Those of the whole model under 1F1B."""
        return activation_bytes(config, pipeline_stage, micro_batches)
