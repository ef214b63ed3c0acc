"""The closed-form start of an align stage: one pass over the layers, without gradients.

The hidden states of the calibration tokens are kept between two layers, those of the dense source and, where
``stage.alignment.calibration_inputs=student``, those of the student beside them. At a replaced layer

1. the dense source's attention says how far its heads look back, and the mixer's decays are set to it;
2. the mixer balances its keys;
3. its output projection is fitted (calibration.py), on the hidden states of either model;

then the tokens go through the layer. With the student's own hidden states each fit sees what the fits before
it left, so that it can make up for it (as GPTQ quantises layer by layer, arXiv 2210.17323, section 4). Each
of the three is a setting; what a mixer does not offer (models/mixers/alignable.py) is left out. Pipeline
stages work one after the other, and hand the hidden states on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer import TransformerLayer
from torch import Tensor

from spikingbrain_train.config.run import AlignmentConfig, AlignmentInputs, DecayStart
from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.models.gpt_model import HybridGPTModel
from spikingbrain_train.models.mixers.alignable import (
    BalancesKeys,
    HasNormedHeads,
    MeasuresDistances,
    TakesHalfLives,
)
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.activity import Activity, format_duration
from spikingbrain_train.training.stages.calibration import ProjectionFit


@dataclass
class Held:
    """A micro-batch of the calibration tokens between two layers."""

    batch: MicroBatch
    teacher: Tensor
    """[T, B, hidden_size] hidden states of the dense source, this rank's share under sequence parallelism."""
    student: Tensor
    """Those of the student; the very same tensor where the fits read the dense source's."""


class ClosedFormStart:
    """Sets the replaced mixers of a pipeline stage.

    Args:
        student: this rank's pipeline stage.
        teacher: the dense source's.
        replaced: 0-based indices, over the whole decoder, of the layers to set.
        settings: what is set.
        groups: process groups.
    """

    def __init__(
        self,
        student: HybridGPTModel,
        teacher: HybridGPTModel,
        replaced: Iterable[int],
        settings: AlignmentConfig,
        groups: ProcessGroups,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.replaced = set(replaced)
        self.settings = settings
        self.groups = groups
        self.own_inputs = settings.calibration_inputs is AlignmentInputs.student

    @torch.no_grad()
    def run(self, batches: Iterable[MicroBatch], progress: Activity) -> dict[str, float]:
        """Go through the layers; a collective of all ranks.

        Args:
            batches: this rank's micro-batches of the calibration tokens.
            progress: of layers.

        Returns:
            ``align/start/...``, the same on every rank: relative errors of the fits and, with the student's
            own hidden states, how far these are from the dense source's behind each of those layers.

        Raises:
            ConfigurationError: a fit has no single solution.
        """
        count = self.student.config.num_layers
        errors, drifts = (
            torch.zeros(count, dtype=torch.float64, device=self.groups.device) for _ in range(2)
        )
        with _evaluating(self.student):
            held = [self._enter(batch) for batch in batches]
            for mine, theirs in zip(self.student.decoder.layers, self.teacher.decoder.layers, strict=True):
                index = mine.layer_number - 1
                if index in self.replaced:
                    errors[index] = self._set(mine, theirs, held)
                else:
                    for each in held:
                        each.teacher = self._through(theirs, self.teacher, each.teacher, each.batch)
                        if not self.own_inputs:
                            each.student = each.teacher
                if self.own_inputs:
                    for each in held:
                        each.student = self._through(mine, self.student, each.student, each.batch)
                    if index in self.replaced:
                        drifts[index] = self._drift(held)
                progress.advance(self.groups.pipeline_model_parallel_size)
            self._leave(held)
        return self._metrics(errors, drifts)

    def describe(self, tokens: int, metrics: Mapping[str, float], seconds: float) -> str:
        """A line for the user about what :meth:`run` has done.

        Args:
            tokens: of the calibration, all ranks together.
            metrics: what it returned.
            seconds: that it took.
        """
        whose = "the student's own" if self.own_inputs else "the dense source's"
        done = [f"{len(self.replaced)} mixers set in closed form on {tokens:,} tokens"]
        if self.settings.decay_start is DecayStart.attention_distance:
            done.append("decays from the dense source's attention distances")
        if "align/start/error" in metrics:
            error = metrics["align/start/error"]
            done.append(f"output projections fitted on {whose} hidden states, error {error:.3f}")
        return f"start: {', '.join(done)} ({format_duration(seconds)})"

    def _set(self, mine: TransformerLayer, theirs: TransformerLayer, held: list[Held]) -> float:
        """Set a replaced mixer; the dense source's hidden states go through its layer. Returns the error."""
        mixer = mine.self_attention
        if self.settings.decay_start is DecayStart.attention_distance:
            self._set_half_lives(mixer, theirs, held)
        if isinstance(mixer, BalancesKeys):
            mixer.balance_keys()
        fit = ProjectionFit(mixer, self.groups) if isinstance(mixer, HasNormedHeads) else None
        for each in held:
            before = each.teacher
            normed, target, each.teacher = self._attention_of(theirs, each)
            if fit is not None:
                weight = None
                if self.own_inputs:
                    normed = mine.input_layernorm(each.student)
                    drift = before.float() - each.student.float()
                    target = target.float() + self.settings.calibration_drift * drift
                    weight = before.float().square().mean(-1).clamp_min(1e-12).reciprocal()
                fit.add(normed, target, each.batch.layout, weight)
            if not self.own_inputs:
                each.student = each.teacher
        return 0.0 if fit is None else fit.solve(self.settings.calibration_ridge)

    def _set_half_lives(self, mixer: torch.nn.Module, theirs: TransformerLayer, held: list[Held]) -> None:
        attention = theirs.self_attention
        if not (isinstance(mixer, TakesHalfLives) and isinstance(attention, MeasuresDistances)):
            return
        sums_H: Tensor | None = None
        tokens = 0
        for each in held:
            layout = each.batch.layout
            found_H = attention.attention_distances(
                theirs.input_layernorm(each.teacher),
                rotary_pos_emb=self.teacher.rotary_pos_emb(layout),
                layout=layout,
            )
            sums_H = found_H if sums_H is None else sums_H + found_H
            tokens += each.batch.tokens.numel()
        assert sums_H is not None, "there are calibration tokens"
        counted = torch.cat([sums_H, sums_H.new_tensor([tokens])])
        torch.distributed.all_reduce(counted, group=self.groups.collection.dp_cp)
        mixer.set_half_lives((counted[:-1] / counted[-1]).clamp_min(1.0))

    def _attention_of(self, theirs: TransformerLayer, each: Held) -> tuple[Tensor, Tensor, Tensor]:
        """What the dense source's attention got and gave, and what its layer gave."""
        seen: list[Tensor] = []

        def keep(_: torch.nn.Module, args: tuple, output: tuple) -> None:
            seen.extend((args[0], output[0].clone()))  # the residual is added to it in place

        handle = theirs.self_attention.register_forward_hook(keep)
        try:
            after = self._through(theirs, self.teacher, each.teacher, each.batch)
        finally:
            handle.remove()
        normed, attended = seen
        return normed, attended, after

    def _through(
        self, layer: TransformerLayer, model: HybridGPTModel, hidden_states: Tensor, batch: MicroBatch
    ) -> Tensor:
        arguments: dict[str, Any] = {
            "attention_mask": None,
            "rotary_pos_emb": model.rotary_pos_emb(batch.layout),
            "packed_seq_params": batch.layout,
        }
        output, _ = layer(hidden_states=hidden_states, **arguments)
        return output

    def _enter(self, batch: MicroBatch) -> Held:
        """The hidden states in front of this pipeline stage's first layer."""
        if self.groups.is_pipeline_first_stage:
            teacher = self.teacher.embed(batch.tokens, batch.layout)
            return Held(
                batch, teacher, self.student.embed(batch.tokens, batch.layout) if self.own_inputs else teacher
            )
        config = self.teacher.config
        length = batch.layout.slice_length
        if config.sequence_parallel:
            length //= config.tensor_model_parallel_size
        received = torch.empty(
            (1 + self.own_inputs, length, batch.tokens.shape[0], config.hidden_size),
            dtype=config.params_dtype,
            device=self.groups.device,
        )
        torch.distributed.recv(received, self._neighbour(-1), group=self.groups.collection.pp)
        return Held(batch, received[0], received[-1])

    def _leave(self, held: list[Held]) -> None:
        """Hand the hidden states to the next pipeline stage."""
        if self.groups.is_pipeline_last_stage:
            return
        for each in held:
            streams = [each.teacher, each.student] if self.own_inputs else [each.teacher]
            torch.distributed.send(torch.stack(streams), self._neighbour(1), group=self.groups.collection.pp)

    def _neighbour(self, step: int) -> int:
        rank = self.groups.pipeline_model_parallel_rank + step
        return torch.distributed.get_global_rank(self.groups.collection.pp, rank)

    def _drift(self, held: list[Held]) -> Tensor:
        """Mean over tokens of |student - teacher|^2 / |teacher|^2 of the hidden states."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.groups.device)
        for each in held:
            distance = (each.student.float() - each.teacher.float()).square().sum(-1)
            relative = distance / each.teacher.float().square().sum(-1).clamp_min(1e-12)
            sums += torch.stack([relative.sum(dtype=torch.float64), sums.new_tensor(relative.numel())])
        torch.distributed.all_reduce(sums, group=self.groups.collection.dp_cp)
        if self.student.config.sequence_parallel:
            torch.distributed.all_reduce(sums, group=self.groups.collection.tp)
        return sums[0] / sums[1]

    def _metrics(self, errors: Tensor, drifts: Tensor) -> dict[str, float]:
        for values in (errors, drifts):
            torch.distributed.all_reduce(values, group=self.groups.collection.pp)
        fitted = [layer for layer in sorted(self.replaced) if errors[layer] != 0]
        metrics = {}
        if fitted:
            metrics["align/start/error"] = errors[fitted].mean().item()
            metrics |= {f"align/start/error/layer_{layer}": errors[layer].item() for layer in fitted}
        if self.own_inputs:
            metrics |= {
                f"align/start/drift/layer_{layer}": drifts[layer].item() for layer in sorted(self.replaced)
            }
        return metrics


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """What a model counts of its training (loads of experts, spikes) is left alone meanwhile."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
