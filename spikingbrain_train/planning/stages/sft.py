"""Supervised fine-tuning: all parameters learn the answers of conversations.

Three stages at 8k, of 500k, 500k and 150k samples (SpikingBrain, arXiv 2509.05276, section 3.4).
"""

from __future__ import annotations

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.setting import leaves
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.planning.stages.token_loss import TokenLossKind


class SupervisedFineTuningKind(TokenLossKind):
    """``stage.kind=sft``."""

    name = "sft"
    trained_by = "spikingbrain_train.training.stages.sft:SupervisedFineTuning"
    reads_examples = True

    def describe(self, config: RunConfig) -> str:
        """What is learnt."""
        return f"{self.name}: {self.learners(config.model)} learn the answers of conversations"

    def all_settings(self, stage: StageConfig) -> set[str]:
        """How examples are read."""
        return super().all_settings(stage) | set(leaves(stage.sft, "stage.sft."))
