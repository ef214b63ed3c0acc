"""What plans know of stages on token losses: every parameter trains, forward and backward."""

from __future__ import annotations

from spikingbrain_train.architecture.layers import alike
from spikingbrain_train.architecture.trained_weights import trains_in_part, what_trains
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.require import require
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.setting import leaves
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.planning.activations import activation_bytes
from spikingbrain_train.planning.costs import (
    forward_flops_per_token,
    hidden_matrix_parameters,
    layers_of_stage,
    stage_parameters,
    stage_routed_expert_parameters,
    total_parameters,
)
from spikingbrain_train.planning.frozen_base import frozen_flops_per_token, stage_trained, trained_in_all
from spikingbrain_train.planning.stages.kind import StageKind


class TokenLossKind(StageKind):
    """All parameters on a loss of every token, from no teacher; a subclass says its name and its class."""

    def reason_for_teacher(self, stage: StageConfig) -> str | None:
        """Nothing: it learns from the text alone."""
        return None

    def all_settings(self, stage: StageConfig) -> set[str]:
        """Losses on what is inside the model."""
        return set(leaves(stage.sparsity, "stage.sparsity."))

    def check(self, stage: StageConfig) -> None:
        """Nobody expects the teacher's logits in it. Raises ConfigurationError."""
        weight = stage.distillation.weight
        require(
            not weight,
            f"stage.distillation.weight={weight} has no part in stage.kind={self.name}, which learns from "
            f"the text alone; set it to null, or distil with stage.kind=distill "
            f"stage.distillation.weight={weight}",
        )

    def check_teacher(
        self,
        stage: StageConfig,
        model: ModelConfig,
        teacher: ModelConfig,
        parallel: ParallelConfig,
        setting: str,
    ) -> None:
        """It has none."""

    def learners(self, model: ModelConfig) -> str:
        """What learns, for :meth:`describe`."""
        return what_trains(model)

    def trainable_parameters(self, config: RunConfig, pipeline_stage: int) -> tuple[int, int]:
        """All of them, or those beside which the others are frozen."""
        if trains_in_part(config.model):
            return stage_trained(config.model, config.parallel, pipeline_stage)
        experts = stage_routed_expert_parameters(config.model, config.parallel, pipeline_stage)
        return experts, stage_parameters(config.model, config.parallel, pipeline_stage) - experts

    def trainable_matrices(self, config: RunConfig, pipeline_stage: int) -> tuple[int, int]:
        """All of them; none where most are frozen, which Muon refuses."""
        if trains_in_part(config.model):
            return 0, 0
        experts, others = 0, 0
        for layer, number in alike(layers_of_stage(config.model, config.parallel, pipeline_stage)):
            found = hidden_matrix_parameters(layer.weights(config.model), config.parallel)
            experts, others = experts + number * found[0], others + number * found[1]
        return experts, others

    def trainable_parameters_in_all(self, model: ModelConfig) -> int:
        """All of them, or those beside which the others are frozen."""
        return trained_in_all(model) if trains_in_part(model) else total_parameters(model)

    def flops_per_token(self, config: RunConfig) -> float:
        """Forward and backward: 3 x forward, about 6 N plus attention.

        Frozen matrices have no gradient of their own: 4 N.
        """
        model, seq_length = config.model, config.stage.seq_length
        flops = 3 * forward_flops_per_token(model, seq_length)
        return flops - frozen_flops_per_token(model, seq_length) if trains_in_part(model) else flops

    def activation_bytes(self, config: RunConfig, pipeline_stage: int, micro_batches: int) -> float:
        """Those of the whole model under 1F1B."""
        return activation_bytes(config, pipeline_stage, micro_batches)
