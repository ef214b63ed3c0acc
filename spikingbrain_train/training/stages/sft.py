"""Supervised fine-tuning: next-token loss on the answers of conversations (arXiv 2509.05276, section 3.4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.models.feed_forwards.routing import HasAuxiliaryLoss
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.training.data_check import ShowActivity
from spikingbrain_train.training.engines.engine import TrainedModel
from spikingbrain_train.training.stages.data import PackedAnswers, StageData
from spikingbrain_train.training.stages.losses import StepLosses
from spikingbrain_train.training.stages.token_loss import TokenLossStage


class SupervisedFineTuning(TokenLossStage):
    """Next-token loss where the loss mask of the examples has it, as the mean over such tokens of a batch.

    Losses of routers and activations are over all tokens, and keep the weight against it that they have in
    pretraining.
    """

    @classmethod
    def open_data(cls, config: RunConfig, groups: ProcessGroups, activity: ShowActivity) -> StageData:
        """Packed examples.

        Raises:
            DataError, ConfigurationError: on every rank; the data do not fit the run.
        """
        return PackedAnswers(config, groups, activity)

    def forward_backward(
        self, model: TrainedModel, batches: Iterator[MicroBatch], num_microbatches: int
    ) -> StepLosses:
        """Accumulate gradients of the mean loss over the global batch's tokens with loss."""
        if (auxiliary := self.find_auxiliary_losses(model)) is not None:
            batch = list(islice(batches, num_microbatches))
            self._scale(auxiliary, batch)
            batches = iter(batch)
        return super().forward_backward(model, batches, num_microbatches)

    def _scale(self, auxiliary: Sequence[HasAuxiliaryLoss], batch: Sequence[MicroBatch]) -> None:
        """Gradients are divided by the tokens with loss: multiply sums over all tokens by their share."""
        tokens = torch.stack([micro_batch.loss_mask.sum(dtype=torch.float64) for micro_batch in batch]).sum()
        torch.distributed.all_reduce(tokens, group=self.groups.collection.dp_cp)
        sequences = len(batch) * self.stage.micro_batch_size * self.groups.data_parallel_size
        share = tokens / (sequences * self.stage.seq_length)
        for each in auxiliary:
            each.scale_auxiliary_loss(share)
