"""Supervised fine-tuning: next-token loss on the answers of conversations (arXiv 2509.05276, section 3.4)."""

from __future__ import annotations

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.training.data_check import ShowActivity
from spikingbrain_train.training.stages.data import PackedAnswers, StageData
from spikingbrain_train.training.stages.token_loss import TokenLossStage


class SupervisedFineTuning(TokenLossStage):
    """Next-token loss where the loss mask of the examples has it, as the mean over such tokens of a batch."""

    @classmethod
    def open_data(cls, config: RunConfig, groups: ProcessGroups, activity: ShowActivity) -> StageData:
        """Packed examples.

        Raises:
            DataError, ConfigurationError: on every rank; the data do not fit the run.
        """
        return PackedAnswers(config, groups, config.model.num_sink_tokens, activity)
