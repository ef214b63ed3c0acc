"""Alignment: mixers that replaced attention learn, layer by layer, to reproduce it; all else is frozen.

Of a network whose feed-forwards alone are other ones (ReLU in the place of SiLU) projections are fitted in
closed form, and nothing is trained.

This project's own: SpikingBrain's report (arXiv 2509.05276) trains all parameters from the first step on.
"""

from __future__ import annotations

from collections.abc import Sequence

from spikingbrain_train.architecture.layers import Layer, alike, dense_source, layers, swapped_layers
from spikingbrain_train.architecture.same_architecture import check_same_sizes
from spikingbrain_train.architecture.sizes import FP32, bytes_per_element, rank_tokens, row_bytes
from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.require import divisors, either, require
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.setting import leaves
from spikingbrain_train.config.stage import AlignmentInputs, StageConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.activations import mixer_activations, weight_copies
from spikingbrain_train.planning.costs import (
    forward_flops_per_token,
    hidden_matrix_parameters,
    layers_of_stage,
    mixer_core_flops,
    mixer_projections,
    stage_layers,
    virtual_stage_layers,
)
from spikingbrain_train.planning.stages.kind import StageKind
from spikingbrain_train.reporting.tables import spans

FITTED_ROLES = ("mlp_down_weight",)
"""Of a dense feed-forward, what is fitted."""


class AlignmentKind(StageKind):
    """``stage.kind=align``."""

    name = "align"
    trained_by = "spikingbrain_train.training.stages.alignment:Alignment"
    reads_source = True
    trains_mixers = True

    next_stage = "stage=distill stage.teacher=..."

    def describe(self, config: RunConfig) -> str:
        """Which mixers learn what from whom."""
        swapped, number = len(swapped_layers(layers(config.model))), config.model.num_layers
        if not swapped:
            return (
                f"{self.name}: projections of {number} layers are fitted in closed form to what those of "
                f"{config.stage.teacher} give"
            )
        return (
            f"{self.name}: the mixers of {swapped} of {number} layers learn to reproduce the attention of "
            f"{config.stage.teacher}"
        )

    def reason_for_teacher(self, stage: StageConfig) -> str | None:
        """Whatever its other settings are."""
        return f"stage.kind={self.name}"

    def all_settings(self, stage: StageConfig) -> set[str]:
        """How it begins."""
        return set(leaves(stage.alignment, "stage.alignment."))

    def settings(self, stage: StageConfig) -> set[str]:
        """Without tokens to fit to there is no fit."""
        if stage.alignment.calibration_tokens == 0:
            return {"stage.alignment.calibration_tokens", "stage.alignment.inputs"}
        refits = stage.alignment.fit_source_projections
        return self.all_settings(stage) - (set() if refits else {"stage.alignment.source_projection_ridge"})

    def check(self, stage: StageConfig) -> None:
        """It has no logits to distil. Raises ConfigurationError."""
        require(
            not stage.distillation.weight,
            f"stage.distillation.weight={stage.distillation.weight} has no part in stage.kind={self.name}, "
            f"which has no logits; set it to null, and distil in stage.kind=distill",
        )

    def starts_in_closed_form(self, stage: StageConfig) -> bool:
        """Where there are tokens to fit to."""
        return stage.alignment.calibration_tokens > 0

    def check_teacher(
        self,
        stage: StageConfig,
        model: ModelConfig,
        teacher: ModelConfig,
        parallel: ParallelConfig,
        setting: str,
    ) -> None:
        """The same network but for its mixers, one of which every pipeline stage has to train.

        Where its feed-forwards alone are others, their projections are fitted and nothing is trained.

        Raises:
            ConfigurationError, CheckpointError: see :class:`StageKind`.
        """
        check_same_sizes(teacher, model, setting)
        if [layer.mixers for layer in layers(teacher)] != [layer.mixers for layer in layers(model)]:
            _check_every_stage_aligns(model, teacher, parallel)
            return
        if model.activation_func is teacher.activation_func:
            raise ConfigurationError(
                f"{setting} has the same mixers as the model, so stage.kind={self.name} has nothing to "
                f"learn; name the dense source as stage.teacher"
            )
        require(
            stage.train_iters == 0 and stage.alignment.fit_source_projections,
            f"{setting} has the model's mixers and other feed-forwards (model.activation_func="
            f"{model.activation_func.value} instead of {teacher.activation_func.value}), which stage.kind="
            f"{self.name} can fit and not train; set stage.train_iters=0 stage.alignment."
            "fit_source_projections=true stage.alignment.calibration_inputs=student, and train in a stage "
            "behind it",
        )
        others = [number for number, layer in enumerate(layers(model)) if not _trained(model, layer)]
        if others:
            raise ConfigurationError(
                f"{setting} has the model's mixers, and of other feed-forwards only dense ones can be fitted "
                f"to its: {_layers_have(others)} none; train with stage.kind=distill"
            )

    def check_plan(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Every pipeline stage has a mixer to train if the teacher is dense. Raises ConfigurationError."""
        if swapped_layers(layers(model)):
            _check_every_stage_aligns(model, dense_source(model), parallel)

    def trainable_parameters(self, config: RunConfig, pipeline_stage: int) -> tuple[int, int]:
        """Those of the swapped mixers; where none is, those that are fitted in feed-forwards."""
        here = layers_of_stage(config.model, config.parallel, pipeline_stage)
        return 0, sum(
            number * weight.numel_on_rank(config.parallel)
            for layer, number in alike(here)
            for weight in _trained(config.model, layer)
        )

    def trainable_matrices(self, config: RunConfig, pipeline_stage: int) -> tuple[int, int]:
        """Of the same."""
        here = layers_of_stage(config.model, config.parallel, pipeline_stage)
        return 0, sum(
            number * sum(hidden_matrix_parameters(_trained(config.model, layer), config.parallel))
            for layer, number in alike(here)
        )

    def trainable_parameters_in_all(self, model: ModelConfig) -> int:
        """Of the same."""
        return sum(
            number * weight.numel
            for layer, number in alike(layers(model))
            for weight in _trained(model, layer)
        )

    def flops_per_token(self, config: RunConfig) -> float:
        """The teacher's forward up to its last hidden states, and forward and backward of each swapped mixer.

        Its projections from the layer's (frozen) input need no gradient with respect to that. On the
        student's own inputs its other layers run forward, too.
        """
        model, stage = config.model, config.stage
        flops = forward_flops_per_token(dense_source(model), stage.seq_length, output_layer=False)
        tokens = 1 + model.num_sink_tokens / stage.seq_length
        for layer, number in alike(swapped_layers(layers(model))):
            reading, other = mixer_projections(model, layer)
            flops += number * tokens * (4.0 * reading + 6.0 * other)
            flops += number * 3 * mixer_core_flops(model, layer, stage.seq_length)
        if stage.alignment.inputs is AlignmentInputs.student:
            flops += forward_flops_per_token(model, stage.seq_length, output_layer=False)
            for layer, number in alike(swapped_layers(layers(model))):  # whose forward has been counted
                flops -= number * tokens * 2.0 * sum(mixer_projections(model, layer))
                flops -= number * mixer_core_flops(model, layer, stage.seq_length)
        return flops

    def start_flops(self, config: RunConfig) -> float:
        """Forward passes of the teacher and of what its fits read, and a fit for every swapped mixer."""
        model, stage = config.model, config.stage
        if not self.starts_in_closed_form(stage):
            return 0.0
        swapped = swapped_layers(layers(model))
        flops = forward_flops_per_token(dense_source(model), stage.seq_length, output_layer=False)
        if stage.alignment.calibration_inputs is AlignmentInputs.student:
            flops += forward_flops_per_token(model, stage.seq_length, output_layer=False)
        else:
            for layer, number in alike(swapped):
                flops += number * 2 * sum(mixer_projections(model, layer))
                flops += number * mixer_core_flops(model, layer, stage.seq_length)
        features = model.num_attention_heads * model.kv_channels
        flops += 2 * len(swapped) * features * (features + model.hidden_size)
        if stage.alignment.fit_source_projections:
            width = model.ffn_hidden_size
            flops += 2 * model.num_layers * width * (width + model.hidden_size)
        return flops * stage.calibration_steps * stage.global_batch_size * stage.seq_length

    def activation_bytes(self, config: RunConfig, pipeline_stage: int, micro_batches: int) -> float:
        """Those of the largest swapped mixer, with its input, and its output and target in fp32.

        Each runs forward and backward at once, between layers of the teacher, which keep nothing. On the
        student's own inputs the targets of all of them wait for it. The closed-form start comes before, and
        counts where it holds more.
        """
        return max(self._training_bytes(config, pipeline_stage), self._start_bytes(config, micro_batches))

    def _start_bytes(self, config: RunConfig, micro_batches: int) -> float:
        """Hidden states of the calibration tokens on a rank, and the sums of the widest fit.

        Those of both models between two layers, and four tensors of what the dense source's layer made of
        them.
        """
        stage, model = config.stage, config.model
        settings = stage.alignment
        if settings.calibration_tokens == 0:
            return 0.0
        tokens = stage.calibration_steps * micro_batches * rank_tokens(config)
        features = model.num_attention_heads * model.kv_channels
        if settings.fit_source_projections:
            features = max(features, model.ffn_hidden_size)
        # Sums in fp32; while they are solved, in fp64: as they are, with the pull, and factorised.
        sums = features * (features + model.hidden_size) * (FP32 + 3 * 2 * FP32)
        return 6 * tokens * row_bytes(config) + sums

    def _training_bytes(self, config: RunConfig, pipeline_stage: int) -> float:
        model, here = config.model, layers_of_stage(config.model, config.parallel, pipeline_stage)
        boundary = model.hidden_size * (bytes_per_element(config.precision) + 2 * FP32)

        def kept(layer: Layer) -> float:
            copies = weight_copies(config, layer.mixer_weights(model))
            return rank_tokens(config) * (mixer_activations(config, layer) + boundary) + copies

        swapped = swapped_layers(here)
        waiting = 0.0
        if config.stage.alignment.inputs is AlignmentInputs.student:
            described = layers(model)
            most = max(
                len(swapped_layers([described[layer] for layer in together]))
                for together in virtual_stage_layers(model, config.parallel, pipeline_stage)
            )
            waiting = most * rank_tokens(config) * row_bytes(config)
        return waiting + max((kept(layer) for layer, _ in alike(swapped)), default=0.0)


def _trained(model: ModelConfig, layer: Layer) -> Sequence[Weight]:
    """The weights of a layer that have gradients."""
    if swapped_layers(layers(model)):
        return () if layer.has_the_sources_mixer else layer.mixer_weights(model)
    if not layer.feed_forward.is_of_the_source:
        return ()
    return [weight for weight in layer.feed_forward_weights(model) if weight.roles == FITTED_ROLES]


def _check_every_stage_aligns(model: ModelConfig, teacher: ModelConfig, parallel: ParallelConfig) -> None:
    """Every pipeline stage has a mixer to train.

    megatron-core can neither step nor save an optimizer of nothing.

    Args:
        model: the network that is aligned, whose layers the pipeline's stages share.
        teacher: its teacher, of as many layers.
        parallel: degrees that split it.

    Raises:
        ConfigurationError: names the layers of the first stage that trains nothing, and degrees that fit.
    """
    pairs = zip(layers(model), layers(teacher), strict=True)
    trained = [mine.mixers != theirs.mixers for mine, theirs in pairs]

    def idle(split: ParallelConfig) -> list[list[int]]:
        stages = (stage_layers(model, split, each) for each in range(split.pipeline_model_parallel_size))
        return [stage for stage in stages if not any(trained[layer] for layer in stage)]

    def evenly(degree: int) -> ParallelConfig:
        return ParallelConfig(pipeline_model_parallel_size=degree)

    pipeline, layout = parallel.pipeline_model_parallel_size, parallel.pipeline_model_parallel_layout
    setting = f"size={pipeline}" if layout is None else f"layout=[{','.join(map(str, layout))}]"
    for stage in idle(parallel)[:1]:
        fitting = [degree for degree in divisors(len(trained)) if not idle(evenly(degree))]
        raise ConfigurationError(
            f"parallel.pipeline_model_parallel_{setting} leaves a pipeline stage nothing to train in "
            f"stage.kind=align: {_layers_have(stage)} the teacher's mixers; even stages can be "
            f"{either(fitting)}"
        )


def _layers_have(stage: Sequence[int]) -> str:
    if len(stage) == 1:
        return f"layer {stage[0]} has"
    if stage[-1] - stage[0] == len(stage) - 1:
        return f"layers {stage[0]} to {stage[-1]} have"
    return f"layers {spans(stage)} have"
