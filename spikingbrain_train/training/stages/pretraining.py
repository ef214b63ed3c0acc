"""Continual pretraining: all parameters on next-token loss, optionally with the dense source as teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from spikingbrain_train.config.run import StageConfig
from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.models.gpt_model import HybridGPTModel
from spikingbrain_train.models.output_head import gather_hidden_states, vocab_parallel_linear_cross_entropy
from spikingbrain_train.ops.linear_cross_entropy import Distillation, TokenLosses
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.training.stages.losses import StepLosses
from spikingbrain_train.training.stages.stage import Stage


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

    def forward_backward(
        self, model: DistributedDataParallel, batches: Iterator[MicroBatch], num_microbatches: int
    ) -> StepLosses:
        """Accumulate gradients of the mean loss over the global batch's unmasked tokens."""
        num_sink_tokens = unwrap_model(model).model_config.num_sink_tokens
        widen = {}
        if self.teacher is not None and self.groups.pipeline_model_parallel_size > 1:
            widen["adjust_tensor_shapes_fn"] = partial(_widen, self.teacher.config.hidden_size)
        reports = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=batches,
            model=[model],
            num_microbatches=num_microbatches,
            seq_length=self.stage.seq_length + num_sink_tokens,
            micro_batch_size=self.stage.micro_batch_size,
            forward_only=False,
            **widen,
        )
        sums = sum(reports) if reports else torch.zeros(3, dtype=torch.float64, device=self.groups.device)
        return StepLosses(sums, self._metrics, weight=sums[0])

    def _metrics(self, sums: Tensor) -> dict[str, Tensor]:
        tokens, cross_entropy, kl_divergence = self.groups.sum_from_last_stage(sums).unbind()
        metrics = {"train/loss": cross_entropy / tokens}
        if self.teacher is not None:
            metrics["train/kl_divergence"] = kl_divergence / tokens
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
