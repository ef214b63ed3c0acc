"""Alignment: the mixers that replaced attention learn to reproduce it, layer by layer.

The dense source runs forward once. At each replaced layer its attention's input goes through the student's
mixer too, and the mixer's output is pulled towards the attention's output. Layers do not depend on each
other, so each layer's backward pass runs on the spot: no activations are kept across layers and nothing
travels backwards between pipeline stages. With ``stage.alignment.inputs=student`` the student runs behind the
source, and each mixer's input is what the student has made of the tokens up to there.

Before the first step the mixers are set in closed form (closed_form.py).

The stage is this project's own; SpikingBrain's report (arXiv 2509.05276) has none.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.config.stage import AlignmentInputs, StageConfig
from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.models.mixers.parallel_hybrid import ParallelHybrid
from spikingbrain_train.parallel.forward_passes import pass_forward
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.training.console import Console
from spikingbrain_train.training.engines.engine import TrainedChunk, TrainedModel
from spikingbrain_train.training.parallel_chunks import parallel_chunks
from spikingbrain_train.training.stages.closed_form import ClosedFormStart
from spikingbrain_train.training.stages.compared_rows import compared_rows, share_of_rows
from spikingbrain_train.training.stages.losses import StepLosses
from spikingbrain_train.training.stages.side_by_side import SideBySide
from spikingbrain_train.training.stages.stage import Stage


class Alignment(Stage):
    """Trains the mixers whose kind differs from the teacher's; everything else is frozen.

    The loss of a layer is ``||mixer(x) - attention(x)||^2 / ||attention(x)||^2``, both norms over one
    micro-batch: relative, so that layers of different scale weigh the same. The stage's loss is the mean over
    replaced layers.

    Args:
        stage: sequence length and batch sizes.
        groups: process groups.
        teacher: the frozen dense source in the same topology; it is needed.
    """

    teacher: HybridGPTModel | ModelChunks

    def __init__(
        self,
        stage: StageConfig,
        groups: ProcessGroups,
        teacher: HybridGPTModel | ModelChunks | None = None,
    ) -> None:
        assert teacher is not None, "alignment learns from a teacher"
        super().__init__(stage, groups, teacher)
        self._both = SideBySide(teacher, groups, stage.micro_batch_size)
        self._compared: Tensor | None = None
        """Rows of the micro-batch on its way whose errors count; None for all."""

    def replaced_layers(self, student: HybridGPTModel | ModelChunks) -> list[int]:
        """0-based indices, over the whole decoder, of layers whose mixer is not the teacher's.

        There is none where feed-forwards alone are other ones, which the start in closed form sets.

        Raises:
            ConfigurationError: no layer differs, or the two models differ in more than their mixers' kinds.
        """
        ours, theirs = student.model_config, self.teacher.model_config
        if (ours.num_layers, ours.hidden_size) != (theirs.num_layers, theirs.hidden_size):
            raise ConfigurationError(
                f"stage.teacher has {theirs.num_layers} layers of width {theirs.hidden_size} but the model "
                f"has {ours.num_layers} of width {ours.hidden_size}; align against the dense checkpoint that "
                "this model was converted from."
            )
        pairs = zip(layers(ours), layers(theirs), strict=True)
        replaced = [number for number, (mine, other) in enumerate(pairs) if mine.mixers != other.mixers]
        if not replaced and ours.activation_func is theirs.activation_func:
            raise ConfigurationError(
                "stage.kind=align has nothing to train: every layer of the model has the teacher's mixer; "
                "convert the source with spikingbrain-convert import --conversion spikingbrain_7b "
                "first."
            )
        return replaced

    def freeze(self, model: HybridGPTModel | ModelChunks) -> None:
        """Leave gradients on in the replaced mixers only; where none is, in what is fitted."""
        model.requires_grad_(False)
        for mixer in self._replaced_mixers(model):
            mixer.requires_grad_(True)
        if not self.replaced_layers(model):  # an optimizer needs something
            for layer in model.layers:
                if isinstance(layer.mlp, MLP):
                    layer.mlp.linear_fc2.weight.requires_grad_(True)

    def prepare(
        self,
        model: HybridGPTModel | ModelChunks,
        batches: Iterator[MicroBatch],
        num_microbatches: int,
        console: Console,
    ) -> dict[str, float]:
        """Set in closed form what the replaced mixers offer: decays, balanced keys, output projections.

        See :mod:`~spikingbrain_train.training.stages.closed_form`.
        """
        settings = self.stage.alignment
        if settings.calibration_tokens == 0:
            return {}
        began = time.monotonic()
        tokens_per_step = self.stage.global_batch_size * self.stage.seq_length
        steps = self.stage.calibration_steps
        replaced = self.replaced_layers(model)
        quarter = -(-steps // 4) * num_microbatches
        start = ClosedFormStart(model, self.teacher, replaced, settings, self.groups, quarter=quarter)
        what = "the new mixers" if replaced else "projections"
        with console.activity(
            f"starting {what} in closed form", model.config.num_layers, "layers"
        ) as progress:
            metrics = start.run(itertools.islice(batches, steps * num_microbatches), progress)
        console.say(start.describe(steps * tokens_per_step, metrics, time.monotonic() - began))
        return metrics

    def forward_backward(
        self, model: TrainedModel, batches: Iterator[MicroBatch], num_microbatches: int
    ) -> StepLosses:
        """Accumulate gradients of the mean relative error over the global batch."""
        student: HybridGPTModel | ModelChunks = model.module
        replaced = self.replaced_layers(student)
        scale = 1.0 / (num_microbatches * len(replaced))
        errors = torch.zeros(student.config.num_layers, dtype=torch.float64, device=self.groups.device)
        if self.stage.alignment.inputs is AlignmentInputs.student:
            self._run_both(parallel_chunks(model), batches, num_microbatches, errors, scale)
        else:
            hooks = {
                mixer: partial(self._align_layer, mixer, errors, scale)
                for mixer in self._replaced_mixers(student)
            }
            self._run_teacher(parallel_chunks(model), batches, num_microbatches, hooks)
        # Gradients are sums over data- and context-parallel ranks; dividing by the number of replicas makes
        # them those of the mean. Each replica counts once, on its first context-parallel rank.
        counts = self.groups.context_parallel_rank == 0
        replicas = torch.full((), int(counts), dtype=torch.int, device=self.groups.device)
        finalize_model_grads(parallel_chunks(model), replicas)
        return StepLosses(errors, partial(self._metrics, replaced, scale))

    def _metrics(self, replaced: list[int], scale: float, errors: Tensor) -> dict[str, Tensor]:
        """The mean over replaced layers, which is optimised, and each of them."""
        for group in (self.groups.collection.dp_cp, self.groups.collection.pp):
            torch.distributed.all_reduce(errors, group=group)
        mean = errors.sum() * scale / self.groups.data_parallel_size
        of_layers = errors * (scale * len(replaced) / self.groups.data_parallel_size)
        return {
            "train/loss": mean,
            "align/error": mean,
            **{f"align/error/layer_{layer}": of_layers[layer] for layer in replaced},
        }

    def _replaced_mixers(self, student: HybridGPTModel | ModelChunks) -> list[SelfAttention | ParallelHybrid]:
        """The mixers of this pipeline rank that stand where the teacher has attention."""
        replaced = set(self.replaced_layers(student))
        return [layer.self_attention for layer in student.layers if layer.layer_number - 1 in replaced]

    def _run_teacher(
        self,
        chunks: Sequence[TrainedChunk | HybridGPTModel],
        batches: Iterator[MicroBatch],
        num_microbatches: int,
        hooks: Mapping[SelfAttention | ParallelHybrid, Callable],
    ) -> None:
        """Send micro-batches through the teacher.

        ``hooks`` are called with what its attention at their mixer's layer got and gave, as PyTorch's forward
        hooks with keyword arguments are.
        """
        attention = {layer.layer_number: layer.self_attention for layer in self.teacher.layers}
        handles = [
            attention[mixer.layer_number].register_forward_hook(hook, with_kwargs=True)
            for mixer, hook in hooks.items()
        ]
        self._go_forward(
            self._forward_step,
            chunks,
            batches,
            num_microbatches,
            handles,
            micro_batch_size=self.stage.micro_batch_size,
        )

    def _go_forward(
        self,
        step: Callable,
        chunks: Sequence[TrainedChunk | HybridGPTModel],
        batches: Iterator[MicroBatch],
        num_microbatches: int,
        hooks: Sequence[RemovableHandle],
        **more: Any,
    ) -> None:
        """Forward passes over megatron-core's schedules; ``hooks`` are taken off at the end."""
        sinks = _network(chunks[0]).model_config.num_sink_tokens
        try:
            pass_forward(
                chunks, step, batches, num_microbatches, seq_length=self.stage.seq_length + sinks, **more
            )
        finally:
            for hook in hooks:
                hook.remove()

    def _forward_step(self, batches: Iterator[MicroBatch], model: TrainedChunk | HybridGPTModel):
        batch = next(batches)
        student = _network(model)
        teacher = self._both.teacher_of(student)
        if not teacher.pre_process:
            teacher.set_input_tensor(student.decoder.input_tensor)
        with torch.no_grad():
            hidden = teacher(batch.tokens, layout=batch.layout.without_sinks(), return_hidden_states=True)
        return hidden, _no_loss

    def _align_layer(
        self,
        mixer: SelfAttention | ParallelHybrid,
        errors: Tensor,
        scale: float,
        attention: torch.nn.Module,
        args: tuple,
        kwargs: dict,
        output: tuple[Tensor, Tensor | None],
    ) -> None:
        with torch.enable_grad():
            prediction, _ = mixer(*(x.detach() if torch.is_tensor(x) else x for x in args), **kwargs)
            # Sinks are padding for both: rows of zeros in prediction and target.
            self._learn(mixer, errors, scale, prediction, output[0])

    def _learn(
        self,
        mixer: SelfAttention | ParallelHybrid,
        errors: Tensor,
        scale: float,
        prediction: Tensor,
        target: Tensor,
        rows: Tensor | None = None,
    ) -> None:
        """Backward pass of one mixer on ``rows``, None for all; gradients are on."""
        if rows is not None:
            prediction, target = prediction[rows], target[rows]
        target = target.float()
        power = target.square().sum()
        error = (prediction.float() - target).square().sum()
        # Each rank may hold a share of the sequence: the power is that of all of it.
        torch.distributed.all_reduce(power, group=self.groups.collection.cp)
        if mixer.config.sequence_parallel:
            torch.distributed.all_reduce(power, group=self.groups.collection.tp)
        loss = error / power
        (loss * scale).backward()
        loss = loss.detach()
        if mixer.config.sequence_parallel:
            torch.distributed.all_reduce(loss, group=self.groups.collection.tp)
        errors[mixer.layer_number - 1] += loss

    def _run_both(
        self,
        chunks: Sequence[TrainedChunk],
        batches: Iterator[MicroBatch],
        num_microbatches: int,
        errors: Tensor,
        scale: float,
    ) -> None:
        """Send micro-batches through the teacher, then through the student, whose mixers learn as they pass.

        A mixer's input is what the student made of the tokens so far, its target what the teacher's attention
        gave on its own. Nothing travels backwards: gradients are on inside the mixers alone. Between
        pipeline stages both hidden states travel side by side.
        """
        attention = {layer.layer_number: layer.self_attention for layer in self.teacher.layers}
        targets: dict[int, Tensor] = {}

        def remember(number: int, _: torch.nn.Module, __: tuple, output: tuple) -> None:
            targets[number] = output[0].clone()  # the residual is added to it in place

        def begin(_: torch.nn.Module, __: tuple) -> None:
            torch.set_grad_enabled(True)

        def learn(mixer: SelfAttention | ParallelHybrid, _: tuple, output: tuple) -> tuple:
            target = targets.pop(mixer.layer_number)
            self._learn(mixer, errors, scale, output[0], target, self._compared)
            torch.set_grad_enabled(False)
            return output[0].detach(), *output[1:]

        handles = []
        for mixer in (mixer for chunk in chunks for mixer in self._replaced_mixers(chunk.module)):
            number = mixer.layer_number
            handles.append(attention[number].register_forward_hook(partial(remember, number)))
            handles += [mixer.register_forward_pre_hook(begin), mixer.register_forward_hook(learn)]
        arguments = self._both.schedule_arguments()
        self._go_forward(self._step_of_both, chunks, batches, num_microbatches, handles, **arguments)

    def _step_of_both(self, batches: Iterator[MicroBatch], model: TrainedChunk):
        batch = next(batches)
        student = model.module
        self._both.give(student)
        self._compared = share_of_rows(
            compared_rows(batch), self.groups, sequence_parallel=student.config.sequence_parallel
        )
        with torch.no_grad():
            teacher = self._both.teacher_of(student)
            theirs = teacher(batch.tokens, layout=batch.layout.without_sinks(), return_hidden_states=True)
            ours = student(batch.tokens, layout=batch.layout, return_hidden_states=True)
        return self._both.join(ours, theirs), _no_loss


def _network(model: TrainedChunk | HybridGPTModel) -> HybridGPTModel:
    """The model itself: before the first step there is no engine around it."""
    return model if isinstance(model, HybridGPTModel) else model.module


def _no_loss(output: Tensor) -> tuple[Tensor, Tensor, None]:
    return output.new_zeros(()), output.new_zeros((), dtype=torch.int), None
