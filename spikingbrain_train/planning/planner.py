"""The plan of a run before it starts: who holds which layers, how much memory and work that takes.

Parameters are exact; memory is an estimate of tensors that live at the same time (kernels' workspaces,
communication buffers and fragmentation come on top). Pure Python: no torch.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path

from spikingbrain_train.architecture.layers import (
    Layer,
    feed_forwards_of,
    has_experts,
    layers,
)
from spikingbrain_train.architecture.linear_transforms import transforms_of
from spikingbrain_train.architecture.sizes import bytes_per_element
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.costs import (
    active_parameters,
    layers_of_stage,
    new_parameters,
    stage_layers,
    stage_parameters,
    total_parameters,
)
from spikingbrain_train.planning.memory import (
    MemoryEstimate,
    estimate_memory,
    optimizer_bytes,
)
from spikingbrain_train.planning.precision import PrecisionChoice, expected_precision
from spikingbrain_train.planning.stages.registry import kind_of

GIB = 2**30


def smallest_stage(parallel: ParallelConfig) -> int:
    """The fewest ranks of a pipeline stage in which every degree but data parallelism is whole.

    Tensor x context and expert tensor x expert model parallelism are two layouts of the same ranks.
    """
    dense = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return lcm(dense, parallel.expert_tensor_size * parallel.expert_model_parallel_size)


def launched_world_size(config: RunConfig) -> int:
    """The number of ranks: the launcher's WORLD_SIZE; without one, 1.

    A dry run without a launcher plans for parallel.data_parallel_size copies of the model; if that is null,
    for as few as the degrees allow.

    Raises:
        ConfigurationError: WORLD_SIZE is not a positive number.
    """
    launched = os.environ.get("WORLD_SIZE")
    if launched is None:
        parallel = config.parallel
        if not config.dry_run:
            return 1
        if parallel.data_parallel_size is None:
            return smallest_stage(parallel) * parallel.pipeline_model_parallel_size
        return parallel.data_parallel_size * parallel.model_parallel_size
    if not launched.isdecimal() or int(launched) < 1:
        raise ConfigurationError(
            f"the environment variable WORLD_SIZE={launched} is not a positive number; "
            f"start with torchrun, or unset it"
        )
    return int(launched)


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage, as each of its ranks sees it."""

    layers: range
    kinds: list[Layer]
    """What each of them is."""
    parameters: int
    """Parameters on one rank."""
    memory: MemoryEstimate


def _plan_stage(config: RunConfig, stage: int, world_size: int, micro_batches: int) -> StagePlan:
    model = config.model
    return StagePlan(
        layers=stage_layers(model, config.parallel, stage),
        kinds=layers_of_stage(model, config.parallel, stage),
        parameters=stage_parameters(model, config.parallel, stage),
        memory=estimate_memory(config, stage, world_size, micro_batches),
    )


@dataclass(frozen=True)
class Plan:
    """What a run will do. ``print(plan.render())`` shows it."""

    config: RunConfig
    """The run; its precision is never ``auto``."""
    precision: PrecisionChoice
    """Why it has that precision."""
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
        trainable = kind_of(self.config.stage).trainable_parameters_in_all(model)
        return total_parameters(model) * bytes_per_element(precision) + trainable * optimizer_bytes(precision)

    def render(self) -> str:
        """The plan as text for a terminal."""
        return "\n".join([*self._facts(), "", *self._stage_table()])

    def _facts(self) -> list[str]:
        stage, model, config = self.config.stage, self.config.model, self.config
        learns = "" if not kind_of(stage).needs_teacher(stage) else f", learning from {stage.teacher}"
        bubble = f", pipeline bubble {self.pipeline_bubble:.1%}" if len(self.stages) > 1 else ""
        sinks = f" behind {model.num_sink_tokens} sinks" if model.num_sink_tokens else ""
        chosen = [("precision", self.precision.describe())] if self.precision.reason else []
        rows = [
            ("stage", f"{stage.kind} in {config.precision.name}{learns}"),
            *chosen,
            *(("model" if index == 0 else "", text) for index, text in enumerate(self._model_facts())),
            ("ranks", self._rank_facts()),
            (
                "step",
                f"{self.tokens_per_step:,} tokens: {stage.global_batch_size} sequences of "
                f"{stage.seq_length}{sinks} = {self.data_parallel_size} replicas x {self.micro_batches} "
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

    def _model_facts(self) -> list[str]:
        model = self.config.model
        padded = model.padded_vocab_size(self.config.parallel.tensor_model_parallel_size)
        tied = "tied" if model.share_embeddings_and_output_weights else "untied"
        active = ""
        if has_experts(model):
            active = f"{quantity(active_parameters(model))} active per token, vocabulary included; "
        mixers = _counts(layer.mixer_name for layer in layers(model))
        facts = [
            f"{quantity(total_parameters(model))} parameters ({active}{quantity(new_parameters(model))} "
            f"new): {model.num_layers} layers ({mixers}), hidden {model.hidden_size}, "
            f"FFN {model.ffn_hidden_size}",
            f"{model.num_attention_heads} heads in {model.num_query_groups} groups of width "
            f"{model.kv_channels}, vocabulary {model.vocab_size} (padded to {padded}, {tied})",
        ]
        if not all(kind.is_of_the_source for kind in feed_forwards_of(model)):
            counts = _counts(layer.feed_forward.name for layer in layers(model))
            described = [words for kind in feed_forwards_of(model) if (words := kind.describe(model))]
            facts.append("; ".join([f"feed-forwards: {counts}", *described]))
        return facts + [kind.describe(model) for kind in transforms_of(model)]

    def _rank_facts(self) -> str:
        parallel = self.config.parallel
        degrees = [
            (self.data_parallel_size, "data"),
            (parallel.tensor_model_parallel_size, "tensor"),
            (parallel.pipeline_model_parallel_size, "pipeline"),
            (parallel.context_parallel_size, "context"),
        ]
        facts = [" x ".join(f"{degree} {name}" for degree, name in degrees)]
        if has_experts(self.config.model):
            facts.append(
                f"experts over {parallel.expert_model_parallel_size} expert x "
                f"{parallel.expert_tensor_size} expert tensor ranks of a stage"
            )
        switches = ["sequence_parallel", "use_distributed_optimizer", "overlap_grad_reduce"]
        chosen = [name for name in [*switches, "overlap_param_gather"] if getattr(parallel, name)]
        facts.append(", ".join([*chosen, f"recompute {parallel.recompute.name}"]))
        return f"{self.world_size} = " + "; ".join(facts)

    def _stage_table(self) -> list[str]:
        header = [
            "pipeline stage",
            "layers",
            "mixers",
            "feed-forwards",
            "parameters",
            "weights",
            "gradients",
            "optimizer",
            "activations",
        ]
        with_teacher = kind_of(self.config.stage).needs_teacher(self.config.stage)
        header += ["teacher", "total"] if with_teacher else ["total"]
        rows = [header]
        for index, stage in enumerate(self.stages):
            memory = stage.memory
            parts = [memory.weights, memory.gradients, memory.optimizer, memory.activations]
            parts += [memory.teacher, memory.total] if with_teacher else [memory.total]
            rows.append(
                [
                    str(index),
                    f"{stage.layers.start}-{stage.layers.stop - 1}",
                    _counts(layer.mixer_name for layer in stage.kinds),
                    _counts(layer.feed_forward.name for layer in stage.kinds),
                    f"{stage.parameters:,}",
                    *(f"{part / GIB:.2f}" for part in parts),
                ]
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        text = [
            "  ".join(
                cell.ljust(width) if column < 4 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return ["per rank: exact parameters, estimated memory in GiB", text[0], "-" * len(text[0]), *text[1:]]


def _counts(names: Iterable[str]) -> str:
    """How often each occurs: "14 gla + 14 swa"."""
    return " + ".join(f"{count} {name}" for name, count in Counter(names).items())


def quantity(number: float) -> str:
    """A count with four digits and a unit letter: 134.5 M, 7.617 B."""
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.4g} {letter}"
    return f"{number:.0f}"


def _size(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB else f"{number / 2**20:.1f} MiB"


def plan_run(config: RunConfig, world_size: int) -> Plan:
    """Lay a checked run out over ``world_size`` ranks (planning.checks.check_run_config has accepted it).

    Raises:
        CheckpointError: a checkpoint of this run, whose precision it would keep, is damaged.
    """
    precision = expected_precision(config)
    config = replace(config, precision=precision.precision)
    replicas = world_size // config.parallel.model_parallel_size
    micro_batches = config.stage.global_batch_size // (config.stage.micro_batch_size * replicas)
    return Plan(
        config=config,
        precision=precision,
        world_size=world_size,
        stages=[
            _plan_stage(config, stage, world_size, micro_batches)
            for stage in range(config.parallel.pipeline_model_parallel_size)
        ],
        flops_per_token=kind_of(config.stage).flops_per_token(config),
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
