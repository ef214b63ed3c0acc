"""Hidden states of student and teacher, which travel from pipeline stage to pipeline stage as one tensor."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.parallel.process_groups import ProcessGroups

Shapes = list[tuple]


class SideBySide:
    """How they lie in it: [T, B, both widths]; between virtual stages as many rows of the student's width.

    megatron-core's interleaved schedule knows tensors of the model's width alone; rows of a micro-batch twice
    as large take both, where they are equally wide (planning/stages/distill.py asks for it).

    Args:
        teacher: the frozen source in the topology of the student.
        groups: process groups.
        micro_batch_size: sequences of a micro-batch.
    """

    def __init__(
        self, teacher: HybridGPTModel | ModelChunks, groups: ProcessGroups, micro_batch_size: int
    ) -> None:
        self._teacher = teacher
        self._in_rows = len(teacher.chunks) > 1
        self._several = groups.pipeline_model_parallel_size > 1
        self._rows = micro_batch_size

    def teacher_of(self, student: HybridGPTModel) -> HybridGPTModel:
        """The part of the teacher that is beside a (virtual) stage of the student."""
        return self._teacher.chunks[student.vp_stage or 0]

    def schedule_arguments(self) -> dict[str, Any]:
        """What megatron-core's schedule is told of the tensors between stages."""
        if self._in_rows:
            return {"micro_batch_size": 2 * self._rows}
        if not self._several:
            return {"micro_batch_size": self._rows}
        extra = self._teacher.config.hidden_size
        return {"micro_batch_size": self._rows, "adjust_tensor_shapes_fn": partial(_widen, extra)}

    def join(self, student: Tensor, teacher: Tensor) -> Tensor:
        """What goes to the next stage, from [T, B, hidden_size] of each."""
        return torch.cat((student, teacher), dim=1 if self._in_rows else -1)

    def give(self, student: HybridGPTModel) -> None:
        """Hand each model what came from the stage before, without gradients for the teacher."""
        if student.pre_process:
            return
        both = student.decoder.input_tensor
        width = both.shape[1] // 2 if self._in_rows else student.config.hidden_size
        ours, theirs = both.split(
            (width, both.shape[1 if self._in_rows else -1] - width), 1 if self._in_rows else -1
        )
        student.set_input_tensor(ours.contiguous())
        self.teacher_of(student).set_input_tensor(theirs.detach().contiguous())


def _widen(extra: int, receive: Shapes, send: Shapes) -> tuple[Shapes, Shapes]:
    """Shapes between pipeline stages, ``extra`` wider so that the teacher's hidden states fit beside."""
    return (
        [(*shape[:-1], shape[-1] + extra) for shape in receive],
        [(*shape[:-1], shape[-1] + extra) for shape in send],
    )
