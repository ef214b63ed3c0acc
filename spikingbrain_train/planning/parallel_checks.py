"""Parallel degrees against the ranks that were started, the network and the length of its sequences."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import gcd

from spikingbrain_train.architecture.feed_forwards import FEED_FORWARDS
from spikingbrain_train.architecture.layers import feed_forwards_of, has_experts, mixers_of
from spikingbrain_train.architecture.linear_transforms import transforms_of
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import (
    ParallelConfig,
    Recompute,
)
from spikingbrain_train.config.require import divisors, either, multiples_around, require
from spikingbrain_train.config.stage import StageConfig


def check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    """Parallel degrees against the number of ranks. Raises ConfigurationError."""
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    context, copy = parallel.context_parallel_size, parallel.model_parallel_size
    require(
        world_size % copy == 0,
        f"the world size {world_size} is not divisible by parallel.tensor_model_parallel_size={tensor} x "
        f"parallel.pipeline_model_parallel_size={pipeline} x parallel.context_parallel_size={context}; "
        f"start {copy} ranks or a multiple of it ({how_to_start(copy)}), or choose degrees whose "
        f"product divides {world_size}",
    )
    replicas = world_size // copy
    require(
        parallel.data_parallel_size in (None, replicas),
        f"parallel.data_parallel_size={parallel.data_parallel_size} does not fit: {world_size} ranks / "
        f"({tensor} tensor x {pipeline} pipeline x {context} context) are {replicas} replicas; "
        f"set it to {replicas} or null, or start {copy * (parallel.data_parallel_size or 1)} ranks "
        f"({how_to_start(copy * (parallel.data_parallel_size or 1))})",
    )
    # megatron-core groups the ranks of a pipeline stage a second time for the experts: expert tensor x expert
    # model x expert data (parallel_state.initialize_model_parallel).
    stage_ranks, expert_tensor = world_size // pipeline, parallel.expert_tensor_size
    experts = parallel.expert_model_parallel_size
    fitting = [degree for degree in divisors(stage_ranks) if stage_ranks % (degree * expert_tensor) == 0]
    require(
        bool(fitting),
        f"parallel.expert_tensor_parallel_size={expert_tensor} does not divide the {stage_ranks} ranks of a "
        f"pipeline stage ({tensor} tensor x {context} context x {replicas} data); "
        f"valid are {either(divisors(stage_ranks))}",
    )
    require(
        experts in fitting,
        f"parallel.expert_model_parallel_size={experts} x {expert_tensor} expert tensor ranks do not divide "
        f"the {stage_ranks} ranks of a pipeline stage ({tensor} tensor x {context} context x {replicas} "
        f"data), over which experts are spread; with these ranks valid are {either(fitting)}",
    )


def how_to_start(ranks: int, environment: Mapping[str, str] | None = None) -> str:
    """The option that gives so many ranks: of sbatch in a Slurm job, else of this project's launcher.

    Args:
        ranks: that are wanted.
        environment: variables; None for this process's own.
    """
    known = os.environ if environment is None else environment
    nodes, local = known.get("SLURM_JOB_NUM_NODES", ""), known.get("LOCAL_WORLD_SIZE", "")
    if "SLURM_JOB_ID" not in known or not (nodes.isdecimal() and local.isdecimal() and int(local)):
        return "--nproc-per-node"
    have = f"this Slurm job has {nodes} x {local}"
    if ranks % int(local):
        return f"{have}: sbatch --nodes with NPROC_PER_NODE"
    return f"{have}: sbatch --nodes={ranks // int(local)}"


def check_split(model: ModelConfig, parallel: ParallelConfig) -> None:
    """The network against the degrees that split it. Raises ConfigurationError."""
    tensor = parallel.tensor_model_parallel_size
    shared = gcd(model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size)
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        size = getattr(model, name)
        require(
            size % tensor == 0,
            f"parallel.tensor_model_parallel_size={tensor} does not divide model.{name}={size}; "
            f"valid for this model are {either(divisors(shared))}",
        )
    _check_pipeline_layout(model, parallel)
    if not has_experts(model):
        _check_nothing_for_experts(parallel)
    for feed_forward in feed_forwards_of(model):
        feed_forward.check_split(model, parallel)
    for mixer in mixers_of(model):
        mixer.check_split(model, parallel)
    for transform in transforms_of(model):
        transform.check_split(model, parallel)


def _check_pipeline_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    ranks, layout = parallel.pipeline_model_parallel_size, parallel.pipeline_model_parallel_layout
    virtual, setting = parallel.virtual_stages, "parallel.pipeline_model_parallel_layout"
    stages = ranks * virtual
    if virtual > 1:
        _check_virtual_stages(model, parallel)
    elif layout is None:
        require(
            model.num_layers % stages == 0,
            f"parallel.pipeline_model_parallel_size={stages} does not divide model.num_layers="
            f"{model.num_layers}; valid are {either(divisors(model.num_layers))}, or any up to "
            f"{model.num_layers} with the layers of each stage in {setting}",
        )
    if layout is None:
        return
    shown = f"{setting}=[{','.join(str(number) for number in layout)}]"
    words = f"parallel.pipeline_model_parallel_size is {ranks}"
    if virtual > 1:
        words += f" with {virtual} virtual stages a rank, {stages} in all"
    require(
        len(layout) == stages,
        f"{shown} has the layers of {len(layout)} stages, but {words}; give one number a stage, or null for "
        "even stages",
    )
    require(
        sum(layout) == model.num_layers,
        f"{shown} has {sum(layout)} layers in all, but model.num_layers is {model.num_layers}; give numbers "
        "that add up to it, or null for even stages",
    )


def _check_virtual_stages(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Layers divide over the virtual stages of even ones. Raises ConfigurationError."""
    ranks, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_stages
    valid = [
        number
        for number in divisors(model.num_layers)
        if number > 1 and model.num_layers % (number * ranks) == 0
    ]
    others = f"valid are {either(valid)} and null" if valid else "set it to null"
    require(
        parallel.pipeline_model_parallel_layout is not None or model.num_layers % (ranks * virtual) == 0,
        f"parallel.virtual_pipeline_model_parallel_size={virtual} on parallel.pipeline_model_parallel_size="
        f"{ranks} ranks are {ranks * virtual} stages, which do not divide model.num_layers="
        f"{model.num_layers}; {others}, or give the layers of each in "
        "parallel.pipeline_model_parallel_layout",
    )


def check_micro_batches(stage: StageConfig, parallel: ParallelConfig, replicas: int) -> None:
    """Micro-batches of every step against virtual stages: ranks take them in groups of so many as they are.

    Raises:
        ConfigurationError: a group would not be full (megatron-core's interleaved schedule asks for it).
    """
    if parallel.virtual_stages == 1:
        return
    ranks, each = parallel.pipeline_model_parallel_size, stage.micro_batch_size * replicas
    ramp = stage.batch_size_ramp
    sizes = {"stage.global_batch_size": stage.global_batch_size}
    if ramp.start is not None:
        sizes["stage.batch_size_ramp.start"] = ramp.start
        if ramp.increment is not None:
            sizes["stage.batch_size_ramp.increment"] = ramp.increment
    for setting, size in sizes.items():
        require(
            size % (each * ranks) == 0,
            f"{setting}={size} gives each of {replicas} replicas {size // each} micro-batches of "
            f"stage.micro_batch_size={stage.micro_batch_size}, but with "
            f"parallel.virtual_pipeline_model_parallel_size={parallel.virtual_stages} their number must be a "
            f"multiple of parallel.pipeline_model_parallel_size={ranks}; use "
            f"{setting}={either(multiples_around(size, each * ranks))}",
        )


def _check_nothing_for_experts(parallel: ParallelConfig) -> None:
    of_experts = " or ".join(kind.name for kind in FEED_FORWARDS if kind.routes_tokens)
    reason = f"but model.feed_forwards has no {of_experts} layer"
    require(
        parallel.expert_model_parallel_size == 1,
        f"parallel.expert_model_parallel_size={parallel.expert_model_parallel_size} spreads experts, "
        f"{reason}; set it to 1",
    )
    require(
        parallel.expert_tensor_parallel_size is None,
        f"parallel.expert_tensor_parallel_size={parallel.expert_tensor_parallel_size} splits experts, "
        f"{reason}; set it to null",
    )
    require(
        parallel.recompute in (Recompute.none, Recompute.full),
        f"parallel.recompute={parallel.recompute.name} recomputes parts of mixture-of-experts layers, "
        f"{reason}; choose none or full",
    )
    require(
        parallel.recompute_expert_tokens is None,
        f"parallel.recompute_expert_tokens={parallel.recompute_expert_tokens} is for experts, {reason}; "
        f"set it to null",
    )


def check_sequence_split(seq_length: int, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Sinks and text against the ranks that share a sequence. Raises ConfigurationError."""
    context, sinks = parallel.context_parallel_size, model.num_sink_tokens
    degrees, slices = [], context
    if context > 1:
        degrees.append(f"parallel.context_parallel_size={context}")
    if parallel.sequence_parallel:
        tensor = parallel.tensor_model_parallel_size
        degrees.append(f"parallel.tensor_model_parallel_size={tensor} with parallel.sequence_parallel=true")
        slices *= tensor
    length = seq_length + sinks
    counted = f" + model.num_sink_tokens={sinks} = {length}" if sinks else ""
    valid = [n - sinks for n in multiples_around(length, slices) if n > sinks]
    require(
        length % slices == 0,
        f"stage.seq_length={seq_length}{counted} is not divisible by {' x '.join(degrees)} = {slices} "
        f"slices; use stage.seq_length={either(valid)}",
    )
    require(
        sinks < length // context,
        f"model.num_sink_tokens={sinks} leave no text in the first of parallel.context_parallel_size="
        f"{context} slices of {length // context} tokens; use a stage.seq_length of "
        f"{sinks * (context - 1) + slices} or more, fewer sinks, or a lower context degree",
    )
