"""The closed-form start of an align stage: one pass over the layers, without gradients.

The hidden states of the calibration tokens are kept between two layers, those of the dense source and, where
``stage.alignment.calibration_inputs=student``, those of the student beside them. At a replaced layer

1. the dense source's attention says how far its heads look back, and the mixer's decays are set to it;
2. the mixer balances its keys, and its channels are scaled to what the dense source's heads give;
3. its output projection is fitted (calibration.py);

then the tokens go through the layer. With the student's own hidden states each fit sees what the fits before
it left; the projections that the source keeps can be fitted as well, to take the difference back. Sinks are
the student's alone: they take part in its hidden states, and in none of the fits. Most of it is a setting;
what a mixer does not offer (models/mixers/alignable.py) is left out. Pipeline stages work one after the
other, and hand the hidden states on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer import TransformerLayer
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.stage import AlignmentConfig, AlignmentInputs, DecayStart
from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.models.linears.sub_norm import first_reader, read_by
from spikingbrain_train.models.mixers.alignable import (
    BalancesKeys,
    HasNormedHeads,
    MeasuresDistances,
    ScalesChannels,
    TakesHalfLives,
)
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.activity import Activity, format_duration
from spikingbrain_train.training.stages.calibration import ProjectionFit
from spikingbrain_train.training.stages.channel_scales import SAMPLED, ChannelScales
from spikingbrain_train.training.stages.compared_rows import compared_rows, share_of_rows


@dataclass
class Held:
    """A micro-batch of the calibration tokens between two layers."""

    batch: MicroBatch
    teacher: Tensor
    """[T, B, hidden_size] hidden states of the dense source, this rank's share under sequence parallelism."""
    student: Tensor
    """Those of the student; the very same tensor where the fits read the dense source's."""
    layout: SequenceLayout
    """Of what the student gets: with its sinks where its hidden states are its own."""
    rows: Tensor | None
    """[slice_length, B] bool: tokens that both can be compared on; None for all."""


@dataclass(frozen=True)
class Lesson:
    """What a layer of the dense source made of a micro-batch.

    All but ``heads`` are this rank's share under sequence parallelism.
    """

    normed: Tensor
    """[T, B, hidden_size] what its attention got."""
    heads: Tensor
    """[T, B, features of this tensor-parallel rank] what its attention's output projection got."""
    attended: Tensor
    """[T, B, hidden_size] what its attention gave."""
    after: Tensor
    """[T, B, hidden_size] what the layer gave."""


class ClosedFormStart:
    """Sets the replaced mixers of a pipeline stage.

    Args:
        student: this rank's pipeline stage, or its virtual ones.
        teacher: the dense source's.
        replaced: 0-based indices, over the whole decoder, of the layers to set.
        settings: what is set.
        groups: process groups.
        quarter: micro-batches of this rank that hold a quarter of the tokens, whole steps.
    """

    def __init__(
        self,
        student: HybridGPTModel | ModelChunks,
        teacher: HybridGPTModel | ModelChunks,
        replaced: Iterable[int],
        settings: AlignmentConfig,
        groups: ProcessGroups,
        *,
        quarter: int,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.replaced = set(replaced)
        self.followed = self.replaced or set(range(student.config.num_layers))
        """Layers behind which the drift of the student's hidden states is reported."""
        self.settings = settings
        self.groups = groups
        self.quarter = quarter
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
        errors, drifts = torch.zeros(2, count, dtype=torch.float64, device=self.groups.device).unbind()
        with _evaluating(self.student):
            kept = list(batches)
            for chunk, student in enumerate(self.student.chunks):
                held = [self._enter(chunk, batch) for batch in kept]
                for mine, theirs in zip(student.layers, self.teacher.chunks[chunk].layers, strict=True):
                    index = mine.layer_number - 1
                    errors[index] = self._set_layer(mine, theirs, held)
                    if self.own_inputs and index in self.followed:
                        drifts[index] = self._drift(held)
                    progress.advance(self.groups.pipeline_model_parallel_size)
                self._leave(chunk, held)
        return self._metrics(errors, drifts)

    def _set_layer(self, mine: TransformerLayer, theirs: TransformerLayer, held: list[Held]) -> float:
        """Set what of a layer is to be set, and bring the hidden states behind it.

        Returns:
            The error of its mixer's fit, 0 where it has none.
        """
        seen = [self._teach(theirs, each) for each in held]
        error = 0.0
        if mine.layer_number - 1 in self.replaced:
            error = self._set(mine, theirs, held, seen)
        elif self.settings.fit_source_projections:
            self._fit_attention(mine, held, seen)
        if self.settings.fit_source_projections:
            self._fit_feed_forward(mine, held, seen)
        self._go_through(mine, held, seen)
        return error

    def describe(self, tokens: int, metrics: Mapping[str, float], seconds: float) -> str:
        """A line for the user about what :meth:`run` has done.

        Args:
            tokens: of the calibration, all ranks together.
            metrics: what it returned.
            seconds: that it took.
        """
        whose = "the student's own" if self.own_inputs else "the dense source's"
        if not self.replaced:
            fitted = f"start: projections of all layers fitted in closed form on {tokens:,} tokens"
            return f"{fitted} ({format_duration(seconds)})"
        done = [f"{len(self.replaced)} mixers set in closed form on {tokens:,} tokens"]
        if self.settings.decay_start is DecayStart.attention_distance:
            done.append("decays from the dense source's attention distances")
        if self.settings.fit_channel_scales:
            done.append("channels scaled to its heads")
        if "align/start/error" in metrics:
            error = metrics["align/start/error"]
            done.append(f"output projections fitted on {whose} hidden states, error {error:.3f}")
        if self.settings.fit_source_projections:
            done.append("projections that the source keeps as well")
        return f"start: {', '.join(done)} ({format_duration(seconds)})"

    def _teach(self, theirs: TransformerLayer, each: Held) -> Lesson:
        """Send a micro-batch through the dense source's layer."""
        attention = theirs.self_attention
        with (
            _inputs_of(attention) as normed,
            _inputs_of(first_reader(attention.linear_proj)) as heads,
            _outputs_of(attention) as attended,
        ):
            after = self._through(theirs, self.teacher, each.teacher, each.batch.layout.without_sinks())
        return Lesson(normed[0], heads[0], attended[0], after)

    def _set(
        self, mine: TransformerLayer, theirs: TransformerLayer, held: list[Held], seen: list[Lesson]
    ) -> float:
        """Set a replaced mixer. Returns the error of its fit, 0 where it has none."""
        mixer, settings = mine.self_attention, self.settings
        if settings.decay_start is DecayStart.attention_distance:
            self._set_half_lives(mixer, theirs, held, seen)
        if isinstance(mixer, BalancesKeys):
            mixer.balance_keys()
        inputs = (
            mine.input_layernorm(each.student) if self.own_inputs else lesson.normed
            for each, lesson in zip(held, seen, strict=True)
        )
        if settings.fit_channel_scales and isinstance(mixer, ScalesChannels):
            self._scale_channels(mixer, itertools.islice(inputs, self.quarter), held, seen)
            inputs = (
                mine.input_layernorm(each.student) if self.own_inputs else lesson.normed
                for each, lesson in zip(held, seen, strict=True)
            )
        if not isinstance(mixer, HasNormedHeads):
            return 0.0
        fit = self._fit_of(mixer.linear_proj)
        for normed, each, lesson in zip(inputs, held, seen, strict=True):
            heads = read_by(mixer.linear_proj, mixer.normed_heads(normed, each.layout))
            fit.add(heads, lesson.attended, each.rows)
        return fit.solve(settings.calibration_ridge, "stage.alignment.calibration_ridge")

    def _set_half_lives(
        self, mixer: torch.nn.Module, theirs: TransformerLayer, held: list[Held], seen: list[Lesson]
    ) -> None:
        attention = theirs.self_attention
        if not (isinstance(mixer, TakesHalfLives) and isinstance(attention, MeasuresDistances)):
            return
        sums = []
        for each, lesson in zip(held, seen, strict=True):
            layout = each.batch.layout.without_sinks()
            rotary = self.teacher.rotary_pos_emb(layout)
            of_heads = attention.attention_distances(lesson.normed, rotary_pos_emb=rotary, layout=layout)
            sums.append(torch.cat([of_heads, of_heads.new_full((1,), each.batch.tokens.numel())]))
        total = torch.stack(sums).sum(0)
        torch.distributed.all_reduce(total, group=self.groups.collection.dp_cp)
        mixer.set_half_lives((total[:-1] / total[-1]).clamp_min(1.0))

    def _scale_channels(
        self, mixer: ScalesChannels, inputs: Iterable[Tensor], held: list[Held], seen: list[Lesson]
    ) -> None:
        scales = ChannelScales(self.groups)
        for normed, each, lesson in zip(inputs, held, seen, strict=False):
            outputs_NHCV = mixer.channel_outputs(normed, each.layout, SAMPLED)
            if outputs_NHCV is None:
                return
            _, H, _, V = outputs_NHCV.shape
            taken = each.layout.every(SAMPLED)
            scales.add(outputs_NHCV, lesson.heads.transpose(0, 1)[:, taken].reshape(-1, H, V))
        mixer.scale_channels(scales.solve())

    def _fit_attention(self, mine: TransformerLayer, held: list[Held], seen: list[Lesson]) -> None:
        """Let attention that stays give what the dense source's gives, and take back the drift before it."""
        projection = getattr(mine.self_attention, "linear_proj", None)
        if projection is None:
            return
        fit = self._fit_of(projection)
        for each, lesson in zip(held, seen, strict=True):
            with _inputs_of(projection) as features:
                self._through(mine, self.student, each.student, each.layout)
            fit.add(features[0], lesson.attended + (each.teacher - each.student), each.rows)
        self._solve_source(fit)

    def _fit_feed_forward(self, mine: TransformerLayer, held: list[Held], seen: list[Lesson]) -> None:
        """Let a dense feed-forward end where the dense source's layer ends."""
        if not isinstance(mine.mlp, MLP):
            return
        fit = self._fit_of(mine.mlp.linear_fc2)
        for each, lesson in zip(held, seen, strict=True):
            with _inputs_of(mine.mlp.linear_fc2) as features, _inputs_of(mine.pre_mlp_layernorm) as before:
                self._through(mine, self.student, each.student, each.layout)
            fit.add(features[0], lesson.after - before[0], each.rows)
        self._solve_source(fit)

    def _fit_of(self, projection: Any) -> ProjectionFit:
        return ProjectionFit(projection, self.groups, sequence_parallel=self.student.config.sequence_parallel)

    def _solve_source(self, fit: ProjectionFit) -> None:
        setting = "stage.alignment.source_projection_ridge"
        fit.solve(self.settings.source_projection_ridge, setting, source_scale=1.0)

    def _go_through(self, mine: TransformerLayer, held: list[Held], seen: list[Lesson]) -> None:
        """Bring the hidden states behind the layer."""
        for each, lesson in zip(held, seen, strict=True):
            each.teacher = lesson.after
            if self.own_inputs:
                each.student = self._through(mine, self.student, each.student, each.layout)
            else:
                each.student = each.teacher

    def _through(
        self,
        layer: TransformerLayer,
        model: HybridGPTModel | ModelChunks,
        hidden_states: Tensor,
        layout: SequenceLayout,
    ) -> Tensor:
        arguments: dict[str, Any] = {
            "attention_mask": None,
            "rotary_pos_emb": model.rotary_pos_emb(layout),
            "packed_seq_params": layout,
        }
        output, _ = layer(hidden_states=hidden_states, **arguments)
        return output

    def _enter(self, chunk: int, batch: MicroBatch) -> Held:
        """The hidden states in front of the first layer of a (virtual) pipeline stage."""
        source_layout = batch.layout.without_sinks()
        rest = (batch.layout if self.own_inputs else source_layout, compared_rows(batch))
        if chunk == 0 and self.groups.is_pipeline_first_stage:
            teacher = student = self.teacher.chunks[0].embed(batch.tokens, source_layout)
            if self.own_inputs:
                student = self.student.chunks[0].embed(batch.tokens, batch.layout)
            return Held(batch, teacher, student, *rest)
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
        return Held(batch, received[0], received[-1], *rest)

    def _leave(self, chunk: int, held: list[Held]) -> None:
        """Hand the hidden states to the next (virtual) pipeline stage."""
        if chunk == len(self.student.chunks) - 1 and self.groups.is_pipeline_last_stage:
            return
        for each in held:
            streams = [each.teacher, each.student] if self.own_inputs else [each.teacher]
            torch.distributed.send(torch.stack(streams), self._neighbour(1), group=self.groups.collection.pp)

    def _neighbour(self, step: int) -> int:
        rank = (self.groups.pipeline_model_parallel_rank + step) % self.groups.pipeline_model_parallel_size
        return torch.distributed.get_global_rank(self.groups.collection.pp, rank)

    def _drift(self, held: list[Held]) -> Tensor:
        """Mean over tokens of |student - teacher|^2 / |teacher|^2 of the hidden states."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.groups.device)
        for each in held:
            distance = (each.student.float() - each.teacher.float()).square().sum(-1)
            relative = distance / each.teacher.float().square().sum(-1).clamp_min(1e-12)
            rows = share_of_rows(
                each.rows, self.groups, sequence_parallel=self.student.config.sequence_parallel
            )
            relative = relative if rows is None else relative[rows]
            sums += torch.stack([relative.sum(dtype=torch.float64), sums.new_full((), relative.numel())])
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
                f"align/start/drift/layer_{layer}": drifts[layer].item() for layer in sorted(self.followed)
            }
        return metrics


@contextmanager
def _inputs_of(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collects the first argument of every call of a module."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _outputs_of(attention: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collects what attention gives; copies, because the residual is added to it in place."""
    seen: list[Tensor] = []
    handle = attention.register_forward_hook(lambda _, __, output: seen.append(output[0].clone()))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """What a model counts of its training (loads of experts, spikes) is left alone meanwhile."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
