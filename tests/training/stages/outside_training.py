"""What trains the stage of another package."""

from __future__ import annotations

from spikingbrain_train.models.gpt_model import HybridGPTModel
from spikingbrain_train.training.stages.pretraining import ContinualPretraining


class FrozenEmbedding(ContinualPretraining):
    """Next-token loss over all parameters but the embedding."""

    def freeze(self, model: HybridGPTModel) -> None:
        """The embedding, which is the output projection, too."""
        if model.pre_process:
            model.embedding.requires_grad_(False)
