"""Continual pretraining: all parameters on next-token loss (SpikingBrain, arXiv 2509.05276, section 3.4)."""

from __future__ import annotations

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.planning.stages.token_loss import TokenLossKind


class ContinualPretrainingKind(TokenLossKind):
    """``stage.kind=cpt``."""

    name = "cpt"
    trained_by = "spikingbrain_train.training.stages.pretraining:ContinualPretraining"

    def describe(self, config: RunConfig) -> str:
        """What is learnt."""
        return f"{self.name}: {self.learners(config.model)} learn to predict the next token"
