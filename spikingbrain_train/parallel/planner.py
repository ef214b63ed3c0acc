"""The plan of a run before it starts: who holds which layers, how much memory and work that takes.

Parameters are exact; memory is an estimate of tensors that live at the same time (kernels' workspaces,
communication buffers and fragmentation come on top). Pure Python: no torch.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from spikingbrain_train.config.errors import ConfigurationError
from spikingbrain_train.config.model import Mixer, ModelConfig
from spikingbrain_train.config.parallel import Recompute
from spikingbrain_train.config.run import Precision, RunConfig, StageKind
from spikingbrain_train.parallel.costs import (
    dense_twin,
    mixer_parameters,
    new_mixer_parameters,
    stage_layers,
    stage_parameters,
    swapped_layers,
    total_parameters,
    training_flops_per_token,
)

GIB = 2**30
_FP32 = 4
_LOSS_CHUNK_BYTES = 1 << 30  # the fused output projection and loss hold at most so many logits (on a GPU)
_GLA_CHUNK_TOKENS = 64  # linear attention keeps one fp32 state per chunk for its backward pass


def launched_world_size(config: RunConfig) -> int:
    """The number of ranks: the launcher's WORLD_SIZE; without one, 1.

    A dry run without a launcher plans for parallel.data_parallel_size (1 if null) copies of the model.

    Raises:
        ConfigurationError: WORLD_SIZE is not a positive number.
    """
    launched = os.environ.get("WORLD_SIZE")
    if launched is None:
        parallel = config.parallel
        return (parallel.data_parallel_size or 1) * parallel.model_parallel_size if config.dry_run else 1
    if not launched.isdecimal() or int(launched) < 1:
        raise ConfigurationError(
            f"the environment variable WORLD_SIZE={launched} is not a positive number; "
            f"start with torchrun, or unset it"
        )
    return int(launched)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank."""

    weights: float
    """Weights of the model in the run's precision."""
    gradients: float
    """fp32 gradient buffers of the trainable parameters."""
    optimizer: float
    """Two fp32 moments and, under bf16, fp32 main weights; a share of them with the distributed optimizer."""
    activations: float
    """Kept for the backward pass, for the micro-batches in flight; and the output projection's logits."""
    teacher: float
    """Weights of the dense source, in stages that learn from it."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.teacher


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage, as each of its ranks sees it."""

    layers: range
    mixers: list[Mixer]
    parameters: int
    """Parameters on one rank."""
    memory: MemoryEstimate


def bytes_per_element(precision: Precision) -> int:
    """Bytes of a weight or activation."""
    return 2 if precision is Precision.bf16 else _FP32


def _mixer_activations(model: ModelConfig, mixer: Mixer, tensor: int, element: int) -> float:
    """Bytes per token that a mixer keeps for its backward pass on one rank, its normed input left out."""
    heads, groups, width = model.num_attention_heads, model.num_query_groups, model.kv_channels
    # q, k, v as projected; q and k once more after rotation or ReLU; the output.
    kept: float = ((heads + 2 * groups) + (heads + groups) + heads) * width * element
    if mixer is Mixer.gla:
        kept += heads * width * element  # the output before its norm
        kept += 2 * groups * width * _FP32  # gate logits and log gate
        kept += groups * width * width * _FP32 / _GLA_CHUNK_TOKENS
    return kept / tensor


def _layer_activations(model: ModelConfig, mixer: Mixer, config: RunConfig) -> float:
    """Bytes per token that a whole layer keeps on one rank: residuals and norms, the mixer, the SwiGLU."""
    tensor, element = config.parallel.tensor_model_parallel_size, bytes_per_element(config.precision)
    residual = 4 * model.hidden_size * element / (tensor if config.parallel.sequence_parallel else 1)
    feed_forward = 3 * model.ffn_hidden_size * element / tensor
    return residual + _mixer_activations(model, mixer, tensor, element) + feed_forward


def _activation_bytes(config: RunConfig, stage: int, micro_batches: int) -> float:
    """Activations on a rank of pipeline stage ``stage``, under 1F1B."""
    model, parallel = config.model, config.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    element = bytes_per_element(config.precision)
    tokens = config.stage.micro_batch_size * config.stage.seq_length
    mixers = [model.layer_mixers()[layer] for layer in stage_layers(model, parallel, stage)]
    if config.stage.kind is StageKind.align:
        # Each swapped mixer runs forward and backward at once, between layers of the teacher, which keep
        # nothing: the largest counts, with its input, and its output and target in fp32.
        boundary = model.hidden_size * (element + 2 * _FP32)
        swapped = [mixer for mixer in mixers if mixer is not Mixer.full]
        kept = [_mixer_activations(model, mixer, tensor, element) + boundary for mixer in swapped]
        return tokens * max(kept, default=0.0)
    in_flight = min(stages - stage, micro_batches)
    layers = [_layer_activations(model, mixer, config) for mixer in mixers]
    if parallel.recompute is Recompute.full:
        layer_input = model.hidden_size * element / (tensor if parallel.sequence_parallel else 1)
        total = tokens * (in_flight * len(layers) * layer_input + max(layers))
    else:
        total = tokens * in_flight * sum(layers)
    if stage == stages - 1:
        rows = model.padded_vocab_size(tensor) / tensor
        # The logits of one chunk, which become their gradient; the gradients of projection and hidden states.
        total += min(tokens * rows * element, _LOSS_CHUNK_BYTES)
        total += (rows + tokens) * model.hidden_size * element
    return total


def _trainable_parameters(config: RunConfig, stage: int) -> int:
    """Parameters with a gradient on a rank of pipeline stage ``stage``."""
    model, parallel = config.model, config.parallel
    if config.stage.kind is StageKind.cpt:
        return stage_parameters(model, parallel, stage)
    mixers, layers = model.layer_mixers(), stage_layers(model, parallel, stage)
    return sum(
        mixer_parameters(model, mixers[layer], parallel.tensor_model_parallel_size)
        for layer in swapped_layers(model)
        if layer in layers
    )


def _optimizer_bytes(precision: Precision) -> int:
    return 3 * _FP32 if precision is Precision.bf16 else 2 * _FP32


def needs_teacher(config: RunConfig) -> bool:
    """Whether the stage learns from the dense source."""
    return config.stage.kind is StageKind.align or config.stage.distillation.weight > 0


def _plan_stage(config: RunConfig, stage: int, data_parallel_size: int, micro_batches: int) -> StagePlan:
    model, parallel = config.model, config.parallel
    element = bytes_per_element(config.precision)
    layers, mixers = stage_layers(model, parallel, stage), model.layer_mixers()
    parameters, trainable = stage_parameters(model, parallel, stage), _trainable_parameters(config, stage)
    shards = data_parallel_size if parallel.use_distributed_optimizer else 1
    teacher = stage_parameters(dense_twin(model), parallel, stage) if needs_teacher(config) else 0
    return StagePlan(
        layers=layers,
        mixers=[mixers[layer] for layer in layers],
        parameters=parameters,
        memory=MemoryEstimate(
            weights=parameters * element,
            gradients=trainable * _FP32,
            optimizer=trainable * _optimizer_bytes(config.precision) / shards,
            activations=_activation_bytes(config, stage, micro_batches),
            teacher=teacher * element,
        ),
    )


@dataclass(frozen=True)
class Plan:
    """What a run will do. ``print(plan.render())`` shows it."""

    config: RunConfig
    world_size: int
    stages: list[StagePlan]
    flops_per_token: float
    """Model FLOPs of training one token, forward and backward."""

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model."""
        return self.world_size // self.config.parallel.model_parallel_size

    @property
    def micro_batches(self) -> int:
        """Micro-batches that each replica accumulates in one optimizer step."""
        stage = self.config.stage
        return stage.global_batch_size // (stage.micro_batch_size * self.data_parallel_size)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.config.stage.global_batch_size * self.config.stage.seq_length

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole stage."""
        return self.tokens_per_step * self.config.stage.train_iters

    @property
    def pipeline_bubble(self) -> float:
        """Share of a step that 1F1B leaves a rank idle: (p - 1) / (m + p - 1)."""
        idle = self.config.parallel.pipeline_model_parallel_size - 1
        return idle / (self.micro_batches + idle)

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint: weights and optimizer state."""
        model, precision = self.config.model, self.config.precision
        trainable = total_parameters(model)
        if self.config.stage.kind is StageKind.align:
            mixers = model.layer_mixers()
            trainable = sum(mixer_parameters(model, mixers[layer]) for layer in swapped_layers(model))
        return total_parameters(model) * bytes_per_element(precision) + trainable * _optimizer_bytes(
            precision
        )

    def render(self) -> str:
        """The plan as text for a terminal."""
        return "\n".join([*self._facts(), "", *self._stage_table()])

    def _facts(self) -> list[str]:
        config, model, parallel = self.config, self.config.model, self.config.parallel
        mixers = Counter(mixer.name for mixer in model.layer_mixers())
        counts = " + ".join(f"{count} {name}" for name, count in mixers.items())
        new = mixers["gla"] * new_mixer_parameters(model)
        padded = model.padded_vocab_size(parallel.tensor_model_parallel_size)
        tied = "tied" if model.share_embeddings_and_output_weights else "untied"
        switches = [
            name
            for name in (
                "sequence_parallel",
                "use_distributed_optimizer",
                "overlap_grad_reduce",
                "overlap_param_gather",
            )
            if getattr(parallel, name)
        ]
        stage = config.stage
        learns = "" if not needs_teacher(config) else f", learning from {stage.teacher}"
        bubble = f", pipeline bubble {self.pipeline_bubble:.1%}" if len(self.stages) > 1 else ""
        rows = [
            ("stage", f"{stage.kind.name} in {config.precision.name}{learns}"),
            (
                "model",
                f"{quantity(total_parameters(model))} parameters ({quantity(new)} new): "
                f"{model.num_layers} layers ({counts}), hidden {model.hidden_size}, "
                f"FFN {model.ffn_hidden_size}",
            ),
            (
                "",
                f"{model.num_attention_heads} heads in {model.num_query_groups} groups of width "
                f"{model.kv_channels}, vocabulary {model.vocab_size} (padded to {padded}, {tied})",
            ),
            (
                "ranks",
                f"{self.world_size} = {self.data_parallel_size} data x "
                f"{parallel.tensor_model_parallel_size} tensor x "
                f"{parallel.pipeline_model_parallel_size} pipeline; "
                + ", ".join([*switches, f"recompute {parallel.recompute.name}"]),
            ),
            (
                "step",
                f"{self.tokens_per_step:,} tokens: {stage.global_batch_size} sequences of "
                f"{stage.seq_length} = {self.data_parallel_size} replicas x {self.micro_batches} "
                f"micro-batches of {stage.micro_batch_size}{bubble}",
            ),
            ("length", f"{stage.train_iters:,} steps, {quantity(self.total_tokens)} tokens"),
            (
                "compute",
                f"{self.flops_per_token / 1e9:.4g} GFLOP per token, "
                f"{self.flops_per_token * self.total_tokens:.3g} FLOP in all",
            ),
            (
                "checkpoint",
                f"{_size(self.checkpoint_bytes)}, every {config.checkpoint.save_interval} steps "
                "and at the end",
            ),
        ]
        return [f"{name:<12}{text}" for name, text in rows]

    def _stage_table(self) -> list[str]:
        header = [
            "pipeline stage",
            "layers",
            "mixers",
            "parameters",
            "weights",
            "gradients",
            "optimizer",
            "activations",
        ]
        with_teacher = needs_teacher(self.config)
        header += ["teacher", "total"] if with_teacher else ["total"]
        rows = [header]
        for index, stage in enumerate(self.stages):
            memory = stage.memory
            parts = [memory.weights, memory.gradients, memory.optimizer, memory.activations]
            parts += [memory.teacher, memory.total] if with_teacher else [memory.total]
            counts = Counter(mixer.name for mixer in stage.mixers)
            rows.append(
                [
                    str(index),
                    f"{stage.layers.start}-{stage.layers.stop - 1}",
                    " + ".join(f"{count} {name}" for name, count in counts.items()),
                    f"{stage.parameters:,}",
                    *(f"{part / GIB:.2f}" for part in parts),
                ]
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        text = [
            "  ".join(
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return ["per rank: exact parameters, estimated memory in GiB", text[0], "-" * len(text[0]), *text[1:]]


def quantity(number: float) -> str:
    """A count with four digits and a unit letter: 134.5 M, 7.617 B."""
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.4g} {letter}"
    return f"{number:.0f}"


def _size(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB else f"{number / 2**20:.1f} MiB"


def plan_run(config: RunConfig, world_size: int) -> Plan:
    """Lay a checked run out over ``world_size`` ranks (config.checks.check_run_config has accepted it)."""
    replicas = world_size // config.parallel.model_parallel_size
    micro_batches = config.stage.global_batch_size // (config.stage.micro_batch_size * replicas)
    return Plan(
        config=config,
        world_size=world_size,
        stages=[
            _plan_stage(config, stage, replicas, micro_batches)
            for stage in range(config.parallel.pipeline_model_parallel_size)
        ],
        flops_per_token=training_flops_per_token(config),
    )


def check_disk_space(plan: Plan) -> None:
    """At least one checkpoint fits where the run will write it.

    Raises:
        ConfigurationError: naming output_dir, what is free and what is needed.
    """
    nearest = Path(os.path.abspath(plan.config.output_dir))
    while not nearest.exists():
        nearest = nearest.parent
    free = shutil.disk_usage(nearest).free
    if free < plan.checkpoint_bytes:
        raise ConfigurationError(
            f"output_dir={plan.config.output_dir} has {_size(free)} of free space, but one "
            f"checkpoint of this run takes {_size(plan.checkpoint_bytes)}; free some or choose another folder"
        )
