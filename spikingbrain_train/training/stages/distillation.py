"""Distillation: all parameters learn the dense source's distribution over the next token.

Forward KL on logits (Hinton et al., arXiv 1503.02531). SpikingBrain's report (arXiv 2509.05276) has no such
stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.models.output_head import gather_hidden_states, vocab_parallel_linear_cross_entropy
from spikingbrain_train.ops.linear_cross_entropy import Distillation, KeptDistillation, TokenLosses
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.progress import Shown
from spikingbrain_train.training.data_check import ShowActivity
from spikingbrain_train.training.engines.engine import TrainedChunk
from spikingbrain_train.training.stages.data import CachedText, StageData
from spikingbrain_train.training.stages.side_by_side import SideBySide
from spikingbrain_train.training.stages.token_loss import TokenLossStage


class LogitDistillation(TokenLossStage):
    """KL(teacher || student) of every token, with a share of next-token loss where the weight is below 1.

    With a teacher each pipeline stage runs its layers beside the student's and the tensors sent between
    stages carry both hidden states side by side, so it works under every topology. With a cache of its logits
    there is no teacher: what the cache holds comes with the micro-batches.

    Args:
        stage: sequence length, batch sizes, distillation settings.
        groups: process groups.
        teacher: the frozen dense source in the same topology; None with a cache.
    """

    def __init__(
        self,
        stage: StageConfig,
        groups: ProcessGroups,
        teacher: HybridGPTModel | ModelChunks | None = None,
    ) -> None:
        assert (teacher is None) == (stage.distillation.cache is not None)
        super().__init__(stage, groups, teacher)
        self._both = None if teacher is None else SideBySide(teacher, groups, stage.micro_batch_size)

    @classmethod
    def open_data(cls, config: RunConfig, groups: ProcessGroups, activity: ShowActivity) -> StageData:
        """Packed text, with what a cache holds of it."""
        if config.stage.distillation.cache is None:
            return super().open_data(config, groups, activity)
        return CachedText(config, groups, activity)

    @property
    def shown(self) -> Mapping[str, Shown]:
        """The cross entropy and the KL divergence, too."""
        return {
            **super().shown,
            "train/cross_entropy": Shown("CE", "{:.4f}"),
            "train/kl_divergence": Shown("KL", "{:.4f}"),
        }

    def schedule_arguments(self) -> dict[str, Any]:
        """Tensors between pipeline stages hold the teacher's hidden states, too."""
        return super().schedule_arguments() if self._both is None else self._both.schedule_arguments()

    def optimised(self, cross_entropy: Tensor, kl_divergence: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Both by their shares; see :class:`Distillation`."""
        weight, temperature = self.stage.distillation.share, self.stage.distillation.temperature
        softened = temperature**2 * kl_divergence
        loss = (1 - weight) * cross_entropy + weight * softened
        return loss, {"train/kl_divergence": kl_divergence}

    def forward(self, model: TrainedChunk, batch: MicroBatch) -> Tensor | tuple[Tensor, TokenLosses]:
        """Teacher and student side by side, or the student alone."""
        student = model.module
        if self._both is None:
            hidden = model(batch.tokens, layout=batch.layout, return_hidden_states=True)
            return self._losses(student, hidden, batch, None) if student.post_process else hidden
        self._both.give(student)
        teacher = self._both.teacher_of(student)
        with torch.no_grad():
            # Without sinks of its own, the teacher carries as many rows of padding: one shape for both.
            beside = batch.layout.without_sinks()
            teacher_hidden = teacher(batch.tokens, layout=beside, return_hidden_states=True)
        student_hidden = model(batch.tokens, layout=batch.layout, return_hidden_states=True)
        if not student.post_process:
            return self._both.join(student_hidden, teacher_hidden)
        return self._losses(student, student_hidden, batch, teacher_hidden)

    def _losses(
        self, student: HybridGPTModel, hidden: Tensor, batch: MicroBatch, teacher_hidden: Tensor | None
    ) -> tuple[Tensor, TokenLosses]:
        """Of the last pipeline stage, from the hidden states of both models or those of the student."""
        settings = self.stage.distillation
        split = {
            "num_sink_tokens": batch.layout.local_sink_tokens,
            "sequence_parallel": student.config.sequence_parallel,
            "tp_group": self.groups.collection.tp,
        }
        distillation: Distillation | KeptDistillation
        if self.teacher is None or teacher_hidden is None:
            assert batch.teacher is not None, "a cache's tokens come with the micro-batches"
            ids, shares, log_probabilities = (each.flatten(0, 1) for each in batch.teacher)
            distillation = KeptDistillation(
                ids, shares, log_probabilities, weight=settings.share, temperature=settings.temperature
            )
        else:
            with torch.no_grad():
                teacher_hidden = gather_hidden_states(teacher_hidden, **split)
            distillation = Distillation(
                teacher_hidden,
                self.teacher.output_weight(),
                weight=settings.share,
                temperature=settings.temperature,
            )
        return vocab_parallel_linear_cross_entropy(
            hidden,
            student.output_weight(),
            batch.labels,
            batch.loss_mask,
            vocab_size=student.model_config.vocab_size,
            distillation=distillation,
            **split,
        )
