"""What stages on token losses have in common: forward and backward of a batch, and means to report.

Each kind is a thin subclass that says what a micro-batch's losses are, or brings other data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from spikingbrain_train.architecture.layers import has_experts
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.models.feed_forwards.gated_activation import GatedActivation
from spikingbrain_train.models.feed_forwards.routing import HasAuxiliaryLoss
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.ops.linear_cross_entropy import TokenLosses
from spikingbrain_train.parallel.forward_passes import iterators_of_chunks
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.progress import Shown
from spikingbrain_train.training.engines.engine import TrainedChunk, TrainedModel
from spikingbrain_train.training.parallel_chunks import parallel_chunks
from spikingbrain_train.training.stages.losses import StepLosses
from spikingbrain_train.training.stages.stage import LOSS, Stage

L1_LOSS = GatedActivation.auxiliary_metric


class TokenLossStage(Stage):
    """Trains on a loss of every token that the batch's mask counts, over megatron-core's schedules.

    Those are 1F1B, with virtual stages interleaved. As it stands the loss is the next token's cross entropy;
    a subclass with other data overrides :meth:`open_data`, one with another loss :meth:`forward` and
    :meth:`optimised`. Losses of routers and of activations come on top.

    Args:
        stage: sequence length, batch sizes.
        groups: process groups.
        teacher: see :class:`Stage`.
    """

    def __init__(
        self,
        stage: StageConfig,
        groups: ProcessGroups,
        teacher: HybridGPTModel | ModelChunks | None = None,
    ) -> None:
        super().__init__(stage, groups, teacher)
        self._auxiliary: list[HasAuxiliaryLoss] | None = None
        self._reported_alone: list[str] = []

    def forward(self, model: TrainedChunk, batch: MicroBatch) -> Tensor | tuple[Tensor, TokenLosses]:
        """One micro-batch through this (virtual) pipeline stage.

        Returns:
            What goes to the next pipeline stage; on the last one the sum of losses, [], and those of tokens.
        """
        return model(batch.tokens, batch.labels, batch.loss_mask, layout=batch.layout)

    def optimised(self, cross_entropy: Tensor, kl_divergence: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss whose gradient :meth:`forward` gives, and metrics beside ``train/cross_entropy``.

        Args:
            cross_entropy: [] float64, mean over the tokens of all ranks.
            kl_divergence: the same; 0 where :meth:`forward` reports none.
        """
        return cross_entropy, {}

    def schedule_arguments(self) -> dict[str, Any]:
        """What megatron-core's schedule is told of the tensors between stages."""
        return {"micro_batch_size": self.stage.micro_batch_size}

    def forward_backward(
        self, model: TrainedModel, batches: Iterator[MicroBatch], num_microbatches: int
    ) -> StepLosses:
        """Accumulate gradients of the mean loss over the global batch's unmasked tokens."""
        network, chunks = model.module.model_config, parallel_chunks(model)
        self.find_auxiliary_losses(model)
        before = self._auxiliary_losses()
        reports = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iterators_of_chunks(batches, num_microbatches, len(chunks)),
            model=chunks,
            num_microbatches=num_microbatches,
            seq_length=self.stage.seq_length + network.num_sink_tokens,
            forward_only=False,
            **self.schedule_arguments(),
        )
        sums = sum(reports) if reports else torch.zeros(3, dtype=torch.float64, device=self.groups.device)
        auxiliary = self._auxiliary_losses() - before
        return StepLosses(sums, partial(self._metrics, auxiliary), weight=sums[0])

    def find_auxiliary_losses(self, model: TrainedModel) -> list[HasAuxiliaryLoss] | None:
        """What adds losses on this pipeline rank; None where nothing in the whole model does.

        Which is decided by settings alone: ranks add up the losses of all.
        """
        has_l1 = bool(self.stage.sparsity.l1_factors)
        if self._auxiliary is None and (has_l1 or has_experts(model.module.model_config)):
            self._auxiliary = [each for each in model.modules() if isinstance(each, HasAuxiliaryLoss)]
            self._reported_alone = [L1_LOSS] if has_l1 else []
        return self._auxiliary

    @property
    def shown(self) -> Mapping[str, Shown]:
        """The loss, and the cross entropy where it is not all of it."""
        shown = {"train/loss": LOSS}
        if self._auxiliary is not None:
            shown["train/cross_entropy"] = Shown("CE", "{:.4f}")
        if L1_LOSS in self._reported_alone:
            shown[L1_LOSS] = Shown("L1", "{:.4f}")
        return shown

    def _auxiliary_losses(self) -> Tensor:
        """[1 + those reported alone] float64: what this rank has added to the sum of token losses so far.

        The first is the sum of those that are not reported alone.
        """
        names = [None, *self._reported_alone]
        totals = [torch.zeros((), dtype=torch.float64, device=self.groups.device) for _ in names]
        for each in self._auxiliary or ():
            if each.auxiliary_metric in names:
                totals[names.index(each.auxiliary_metric)] += each.auxiliary_loss()
        return torch.stack(totals)

    def _metrics(self, auxiliary: Tensor, sums: Tensor) -> dict[str, Tensor]:
        """What is optimised, and its parts; means over tokens.

        Args:
            auxiliary: this rank's share of :meth:`_auxiliary_losses`.
            sums: [3] of this rank: tokens, cross entropy, KL divergence.
        """
        tokens, cross_entropy, kl_divergence = self.groups.sum_from_last_stage(sums).unbind()
        mean = cross_entropy / tokens
        loss, parts = self.optimised(mean, kl_divergence / tokens)
        if self._auxiliary is not None:
            # Every rank has tokens, experts or channels of its own, and pipeline stages have other layers.
            torch.distributed.all_reduce(auxiliary)
            means = auxiliary / tokens
            loss = loss + means.sum()
            parts = {**parts, **dict(zip(self._reported_alone, means[1:].unbind(), strict=True))}
        return {"train/loss": loss, "train/cross_entropy": mean, **parts}

    def _forward_step(self, batches: Iterator[MicroBatch], model: TrainedChunk):
        batch = next(batches)
        return self.forward(model, batch), partial(self._loss, batch.loss_mask)

    def _loss(self, loss_mask: Tensor, output: tuple[Tensor, TokenLosses]) -> tuple[Tensor, Tensor, Tensor]:
        """megatron-core's per-token form: the sum of losses, the number of tokens, and what is reported."""
        total, losses = output
        mask = loss_mask.flatten()
        tokens = mask.sum()
        kl_divergence = (
            losses.kl_divergence @ mask if losses.kl_divergence is not None else torch.zeros_like(tokens)
        )
        report = torch.stack([tokens, losses.cross_entropy @ mask, kl_divergence]).double()
        return total, tokens.to(torch.int), report
