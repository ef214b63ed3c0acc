"""Distillation: all parameters learn the dense source's distribution over the next token.

The stage is this project's own; SpikingBrain's report (arXiv 2509.05276) has none.
"""

from __future__ import annotations

from spikingbrain_train.architecture.layers import dense_source
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.require import require
from spikingbrain_train.config.run import RunConfig, StageConfig
from spikingbrain_train.config.setting import leaves
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.planning.costs import forward_flops_per_token
from spikingbrain_train.planning.stages.token_loss import TokenLossKind


class DistillationKind(TokenLossKind):
    """``stage.kind=distill``."""

    name = "distill"
    trained_by = "spikingbrain_train.training.stages.distillation:LogitDistillation"

    def describe(self, config: RunConfig) -> str:
        """What is learnt, and from whom."""
        stage = config.stage
        share = stage.distillation.share
        text = f"{self.name}: all parameters learn from the logits of {stage.teacher}"
        return text if share == 1 else f"{text} ({share:.0%} of the loss) and to predict the next token"

    def reason_for_teacher(self, stage: StageConfig) -> str | None:
        """Whatever its other settings are."""
        return f"stage.kind={self.name}"

    def all_settings(self, stage: StageConfig) -> set[str]:
        """Those of distillation."""
        return set(leaves(stage.distillation, "stage.distillation."))

    def check(self, stage: StageConfig) -> None:
        """There is something to distil. Raises ConfigurationError."""
        require(
            stage.distillation.share > 0,
            f"stage.distillation.weight={stage.distillation.weight} leaves stage.kind={self.name} nothing to "
            f"distil; train on next-token loss alone with stage.kind=cpt stage.distillation.weight=null",
        )

    def check_teacher(
        self, model: ModelConfig, teacher: ModelConfig, parallel: ParallelConfig, setting: str
    ) -> None:
        """Logits are comparable over one vocabulary only. Raises CheckpointError."""
        if teacher.vocab_size != model.vocab_size:
            raise CheckpointError(
                f"{setting} has a vocabulary of {teacher.vocab_size}, but model.vocab_size="
                f"{model.vocab_size}; distillation needs a teacher with the same tokenizer"
            )

    def flops_per_token(self, config: RunConfig) -> float:
        """The teacher's forward on top of the student's training."""
        teacher = forward_flops_per_token(dense_source(config.model), config.stage.seq_length)
        return super().flops_per_token(config) + teacher
