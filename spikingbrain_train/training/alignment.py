"""Alignment: the mixers that replaced attention learn to reproduce it, layer by layer.

The dense source runs forward once. At each replaced layer its attention's input goes through the student's mixer too,
and the mixer's output is pulled towards the attention's output. Layers do not depend on each other, so each layer's
backward pass runs on the spot: no activations are kept across layers and nothing travels backwards between pipeline stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from spikingbrain_train.config.errors import ConfigurationError
from spikingbrain_train.config.run import StageConfig
from spikingbrain_train.models.gpt_model import HybridGPTModel
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.training.stage_step import Batch


class Alignment:
    """Trains the mixers whose kind differs from the teacher's; everything else is frozen.

    The loss of a layer is ``||mixer(x) - attention(x)||^2 / ||attention(x)||^2``, both norms over one micro-batch: relative,
    so that layers of different scale weigh the same. The stage's loss is the mean over replaced layers.

    Args:
        stage: sequence length and batch sizes.
        groups: process groups.
        teacher: the frozen dense source in the same topology.
    """

    def __init__(self, stage: StageConfig, groups: ProcessGroups, teacher: HybridGPTModel) -> None:
        self.stage = stage
        self.groups = groups
        self.teacher = teacher

    def replaced_layers(self, student: HybridGPTModel) -> list[int]:
        """0-based indices, over the whole decoder, of layers whose mixer is not the teacher's.

        Raises:
            ConfigurationError: no layer differs, or the two models differ in more than their mixers' kinds.
        """
        ours, theirs = student.model_config, self.teacher.model_config
        if (ours.num_layers, ours.hidden_size) != (theirs.num_layers, theirs.hidden_size):
            raise ConfigurationError(
                f"stage.teacher has {theirs.num_layers} layers of width {theirs.hidden_size} but the model has "
                f"{ours.num_layers} of width {ours.hidden_size}; align against the dense checkpoint that this model was "
                "converted from."
            )
        pairs = zip(ours.layer_mixers(), theirs.layer_mixers(), strict=True)
        layers = [layer for layer, (mine, other) in enumerate(pairs) if mine is not other]
        if not layers:
            raise ConfigurationError(
                "stage.kind=align has nothing to train: every layer of the model has the teacher's mixer; convert the source "
                "with tools/convert_checkpoint.py import --conversion spikingbrain_7b first."
            )
        return layers

    def freeze(self, model: HybridGPTModel) -> None:
        """Leave gradients on in the replaced mixers only."""
        replaced = set(self.replaced_layers(model))
        model.requires_grad_(False)
        for layer in model.decoder.layers:
            if layer.layer_number - 1 in replaced:
                layer.self_attention.requires_grad_(True)

    def forward_backward(
        self, model: DistributedDataParallel, batches: Iterator[Batch], num_microbatches: int
    ) -> dict[str, float]:
        """Accumulate gradients of the mean relative error over the global batch."""
        student: HybridGPTModel = model.module
        replaced = self.replaced_layers(student)
        scale = 1.0 / (num_microbatches * len(replaced))
        errors = torch.zeros(student.config.num_layers, dtype=torch.float64, device=self.groups.device)
        hooks = [
            layer.self_attention.register_forward_hook(
                partial(self._align_layer, student.decoder.layers[index].self_attention, errors, scale),
                with_kwargs=True,
            )
            for index, layer in enumerate(self.teacher.decoder.layers)
            if layer.layer_number - 1 in replaced
        ]
        try:
            get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=batches,
                model=[model],
                num_microbatches=num_microbatches,
                seq_length=self.stage.seq_length,
                micro_batch_size=self.stage.micro_batch_size,
                forward_only=True,
            )
        finally:
            for hook in hooks:
                hook.remove()
        # Gradients are sums over data-parallel ranks; dividing by their number makes them those of the mean.
        replicas = torch.ones((), dtype=torch.int, device=self.groups.device)
        finalize_model_grads([model], replicas)
        for group in (self.groups.collection.dp, self.groups.collection.pp):
            torch.distributed.all_reduce(errors, group=group)
        return {"train/loss": errors.sum().item() * scale / self.groups.data_parallel_size}

    def _forward_step(self, batches: Iterator[Batch], model: DistributedDataParallel):
        batch = next(batches)
        if not self.teacher.pre_process:
            self.teacher.set_input_tensor(model.module.decoder.input_tensor)
        with torch.no_grad():
            hidden = self.teacher(batch["tokens"], batch["position_ids"], return_hidden_states=True)
        return hidden, lambda output: (output.new_zeros(()), output.new_zeros((), dtype=torch.int), None)

    def _align_layer(
        self,
        mixer: torch.nn.Module,
        errors: Tensor,
        scale: float,
        attention: torch.nn.Module,
        args: tuple,
        kwargs: dict,
        output: tuple[Tensor, Tensor | None],
    ) -> None:
        target = output[0].float()
        power = target.square().sum()
        with torch.enable_grad():
            prediction, _ = mixer(*(x.detach() if torch.is_tensor(x) else x for x in args), **kwargs)
            error = (prediction.float() - target).square().sum()
            if mixer.config.sequence_parallel:
                # Each rank holds its share of the sequence: the norms are over all of it.
                power = self._sum_over_tensor_parallel(power)
            loss = error / power
            (loss * scale).backward()
        loss = loss.detach()
        if mixer.config.sequence_parallel:
            loss = self._sum_over_tensor_parallel(loss)
        errors[mixer.layer_number - 1] += loss

    def _sum_over_tensor_parallel(self, value: Tensor) -> Tensor:
        value = value.clone()
        torch.distributed.all_reduce(value, group=self.groups.collection.tp)
        return value
