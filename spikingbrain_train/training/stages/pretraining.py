"""Continual pretraining: all parameters on next-token loss (SpikingBrain, arXiv 2509.05276, section 3.4)."""

from __future__ import annotations

from spikingbrain_train.training.stages.token_loss import TokenLossStage


class ContinualPretraining(TokenLossStage):
    """Next-token loss over packed text, from no teacher."""
