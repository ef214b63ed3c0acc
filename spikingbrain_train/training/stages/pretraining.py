"""Continual pretraining: all parameters on next-token loss, optionally with the dense source as teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from spikingbrain_train.architecture.layers import has_experts
from spikingbrain_train.config.run import StageConfig
from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.models.feed_forwards.routing import HasAuxiliaryLoss
from spikingbrain_train.models.gpt_model import HybridGPTModel
from spikingbrain_train.models.output_head import gather_hidden_states, vocab_parallel_linear_cross_entropy
from spikingbrain_train.ops.linear_cross_entropy import Distillation, TokenLosses
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.progress import Shown
from spikingbrain_train.training.stages.losses import StepLosses
from spikingbrain_train.training.stages.stage import LOSS, Stage


class ContinualPretraining(Stage):
    """Next-token training over megatron-core's schedules (1F1B under pipeline parallelism).

    With a teacher, each pipeline stage runs the teacher's layers beside the student's and the tensors sent
    between stages carry both hidden states side by side, so distillation works under every topology.

    Args:
        stage: sequence length, batch sizes, distillation settings.
        groups: process groups.
        teacher: the frozen dense source in the same topology; needed when ``stage.distillation.weight`` is
            above 0.
    """

    def __init__(
        self, stage: StageConfig, groups: ProcessGroups, teacher: HybridGPTModel | None = None
    ) -> None:
        assert (teacher is not None) == (stage.distillation.weight > 0)
        super().__init__(stage, groups, teacher)
        self._routers: list[HasAuxiliaryLoss] | None = None
        """Of this pipeline stage; None where no layer of the model has one."""

    def forward_backward(
        self, model: DistributedDataParallel, batches: Iterator[MicroBatch], num_microbatches: int
    ) -> StepLosses:
        """Accumulate gradients of the mean loss over the global batch's unmasked tokens."""
        network = unwrap_model(model).model_config
        if self._routers is None and has_experts(network):
            self._routers = [module for module in model.modules() if isinstance(module, HasAuxiliaryLoss)]
        before = self._auxiliary_loss()
        widen = {}
        if self.teacher is not None and self.groups.pipeline_model_parallel_size > 1:
            widen["adjust_tensor_shapes_fn"] = partial(_widen, self.teacher.config.hidden_size)
        reports = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=batches,
            model=[model],
            num_microbatches=num_microbatches,
            seq_length=self.stage.seq_length + network.num_sink_tokens,
            micro_batch_size=self.stage.micro_batch_size,
            forward_only=False,
            **widen,
        )
        sums = sum(reports) if reports else torch.zeros(3, dtype=torch.float64, device=self.groups.device)
        auxiliary = self._auxiliary_loss() - before
        return StepLosses(sums, partial(self._metrics, auxiliary), weight=sums[0])

    @property
    def shown(self) -> Mapping[str, Shown]:
        """The cross entropy where it is not all of the loss, and the KL divergence."""
        shown = {"train/loss": LOSS}
        if self._routers is not None or self.teacher is not None:
            shown["train/cross_entropy"] = Shown("CE", "{:.4f}")
        if self.teacher is not None:
            shown["train/kl_divergence"] = Shown("KL", "{:.4f}")
        return shown

    def _auxiliary_loss(self) -> Tensor:
        """[] float64: what this rank's routers have added to the sum of token losses so far."""
        total = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        for router in self._routers or ():
            total += router.auxiliary_loss()
        return total

    def _metrics(self, auxiliary: Tensor, sums: Tensor) -> dict[str, Tensor]:
        """What is optimised, and its parts; means over tokens.

        Args:
            auxiliary: [] this rank's share of the routers' losses.
            sums: [3] of this rank: tokens, cross entropy, KL divergence.
        """
        tokens, cross_entropy, kl_divergence = self.groups.sum_from_last_stage(sums).unbind()
        loss = cross_entropy / tokens
        metrics = {"train/loss": loss, "train/cross_entropy": loss}
        if self.teacher is not None:
            settings = self.stage.distillation
            metrics["train/kl_divergence"] = kl_divergence / tokens
            softened = settings.temperature**2 * metrics["train/kl_divergence"]
            metrics["train/loss"] = (1 - settings.weight) * loss + settings.weight * softened
        if self._routers is not None:
            # Every rank routes tokens of its own, and pipeline stages have other routers.
            torch.distributed.all_reduce(auxiliary)
            metrics["train/loss"] = metrics["train/loss"] + auxiliary / tokens
        return metrics

    def _forward_step(self, batches: Iterator[MicroBatch], model: DistributedDataParallel):
        batch = next(batches)
        if self.teacher is None:
            output = model(batch.tokens, batch.labels, batch.loss_mask, layout=batch.layout)
        else:
            output = self._forward_beside_teacher(self.teacher, batch, model)
        return output, partial(self._loss, batch.loss_mask)

    def _forward_beside_teacher(
        self, teacher: HybridGPTModel, batch: MicroBatch, model: DistributedDataParallel
    ):
        student: HybridGPTModel = model.module
        if not student.pre_process:
            both = student.decoder.input_tensor
            width = student.config.hidden_size
            student.set_input_tensor(both[..., :width].contiguous())
            teacher.set_input_tensor(both[..., width:].detach().contiguous())
        with torch.no_grad():
            # Without sinks of its own, the teacher carries as many rows of padding: one shape for both.
            beside = replace(batch.layout, sinks_are_padding=True)
            teacher_hidden = teacher(batch.tokens, layout=beside, return_hidden_states=True)
        student_hidden = model(batch.tokens, layout=batch.layout, return_hidden_states=True)
        if not student.post_process:
            return torch.cat([student_hidden, teacher_hidden], dim=-1)
        split = {
            "num_sink_tokens": batch.layout.local_sink_tokens,
            "sequence_parallel": student.config.sequence_parallel,
            "tp_group": self.groups.collection.tp,
        }
        with torch.no_grad():
            teacher_hidden = gather_hidden_states(teacher_hidden, **split)
        return vocab_parallel_linear_cross_entropy(
            student_hidden,
            student.output_weight(),
            batch.labels,
            batch.loss_mask,
            vocab_size=student.model_config.vocab_size,
            **split,
            distillation=Distillation(
                teacher_hidden,
                teacher.output_weight(),
                weight=self.stage.distillation.weight,
                temperature=self.stage.distillation.temperature,
            ),
        )

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


def _widen(extra: int, receive: list[tuple], send: list[tuple]) -> tuple[list[tuple], list[tuple]]:
    """Shapes between pipeline stages, ``extra`` wider so that the teacher's hidden states fit beside."""
    return (
        [(*shape[:-1], shape[-1] + extra) for shape in receive],
        [(*shape[:-1], shape[-1] + extra) for shape in send],
    )
