"""The settings of a run against each other and the world size. Decides without torch, in the first second.

Every error is one ConfigurationError that names the setting and says what would be valid.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from math import gcd
from typing import Any

from spikingbrain_train.config.errors import ConfigurationError
from spikingbrain_train.config.file_checks import check_files
from spikingbrain_train.config.model import Mixer, ModelConfig
from spikingbrain_train.config.parallel import (
    AcceleratorKind,
    LinearAttentionBackend,
    ParallelConfig,
    ParallelLinearBackend,
    SoftmaxAttentionBackend,
)
from spikingbrain_train.config.run import LRDecayStyle, OptimizerConfig, RunConfig, StageConfig, StageKind


def divisors(number: int) -> list[int]:
    """All positive divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _either(values: list[int]) -> str:
    return (
        " or ".join([", ".join(map(str, values[:-1])), str(values[-1])])
        if len(values) > 1
        else str(values[0])
    )


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigurationError(sentence)


def _at_least(config: Any, prefix: str, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            _require(value >= minimum, f"{prefix}.{name}={value} must be at least {minimum}")


def _above_zero(config: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            _require(value > 0, f"{prefix}.{name}={value} must be greater than 0")


def _floats(config: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _floats(value, f"{prefix}{field.name}.")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float):
                yield f"{prefix}{field.name}", number


def check_model(model: ModelConfig) -> None:
    """Sizes of the network on their own. Raises ConfigurationError."""
    _at_least(
        model,
        "model",
        1,
        *(
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
        ),
        *("vocab_size", "max_position_embeddings", "sliding_window", "make_vocab_size_divisible_by"),
    )
    _require(
        len(model.mixers) > 0, "model.mixers is empty; name at least one mixer, e.g. model.mixers=[gla,swa]"
    )
    _require(
        len(model.mixers) <= model.num_layers,
        f"model.mixers lists {len(model.mixers)} mixers for model.num_layers={model.num_layers}; "
        f"list at most one a layer",
    )
    heads, groups = model.num_attention_heads, model.num_query_groups
    _require(
        heads % groups == 0,
        f"model.num_query_groups={groups} does not divide model.num_attention_heads={heads}; "
        f"valid are {_either(divisors(heads))}",
    )
    if set(model.layer_mixers()) & {Mixer.full, Mixer.swa}:
        _require(
            model.kv_channels % 2 == 0,
            f"model.kv_channels={model.kv_channels} is odd, but rotary positions turn pairs of channels; "
            f"use an even number",
        )
    _above_zero(model, "model", "rotary_base", "norm_epsilon")
    _at_least(model, "model", 0, "init_method_std")
    _at_least(model.gla, "model.gla", 1, "gate_low_rank_dim")
    _above_zero(model.gla, "model.gla", "gate_logit_normalizer")
    _at_least(model.gla, "model.gla", 0, "init_gate_std")
    scaling = model.rope_scaling
    _at_least(scaling, "model.rope_scaling", 1, "factor", "original_max_position_embeddings")
    _above_zero(scaling, "model.rope_scaling", "low_freq_factor", "high_freq_factor")
    _require(
        scaling.factor == 1 or scaling.low_freq_factor < scaling.high_freq_factor,
        f"model.rope_scaling.high_freq_factor={scaling.high_freq_factor} must be greater than "
        f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor}",
    )


def check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    """Parallel degrees against the number of ranks. Raises ConfigurationError."""
    _at_least(
        parallel,
        "parallel",
        1,
        *("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size"),
    )
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    copy = parallel.model_parallel_size
    _require(
        world_size % copy == 0,
        f"the world size {world_size} is not divisible by parallel.tensor_model_parallel_size={tensor} x "
        f"parallel.pipeline_model_parallel_size={pipeline}; start {copy} ranks or a multiple of it "
        f"(torchrun --nproc-per-node), or choose degrees whose product divides {world_size}",
    )
    replicas = world_size // copy
    _require(
        parallel.data_parallel_size in (None, replicas),
        f"parallel.data_parallel_size={parallel.data_parallel_size} does not fit: {world_size} ranks / "
        f"({tensor} tensor x {pipeline} pipeline) are {replicas} replicas; "
        f"set it to {replicas} or null, or start {copy * (parallel.data_parallel_size or 1)} ranks",
    )


def check_split(model: ModelConfig, parallel: ParallelConfig) -> None:
    """The network against tensor and pipeline degrees. Raises ConfigurationError."""
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    shared = gcd(model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size)
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        size = getattr(model, name)
        _require(
            size % tensor == 0,
            f"parallel.tensor_model_parallel_size={tensor} does not divide model.{name}={size}; "
            f"valid for this model are {_either(divisors(shared))}",
        )
    _require(
        model.num_layers % pipeline == 0,
        f"parallel.pipeline_model_parallel_size={pipeline} does not divide "
        f"model.num_layers={model.num_layers}; valid are {_either(divisors(model.num_layers))}",
    )
    _require(
        not (parallel.sequence_parallel and tensor == 1),
        "parallel.sequence_parallel=true splits the sequence over tensor-parallel ranks, but "
        "parallel.tensor_model_parallel_size is 1; set it to false, or the tensor degree to 2 or more",
    )
    _require(
        parallel.use_distributed_optimizer or not parallel.overlap_param_gather,
        "parallel.overlap_param_gather=true needs parallel.use_distributed_optimizer=true",
    )
    _require(
        parallel.overlap_grad_reduce or not parallel.overlap_param_gather,
        "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true",
    )


def check_stage(stage: StageConfig, model: ModelConfig, parallel: ParallelConfig, world_size: int) -> None:
    """Batch sizes, lengths and the teacher. Raises ConfigurationError."""
    _at_least(stage, "stage", 1, "train_iters", "seq_length", "micro_batch_size", "global_batch_size")
    tensor = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel:
        below, above = stage.seq_length // tensor * tensor, -(-stage.seq_length // tensor) * tensor
        _require(
            stage.seq_length % tensor == 0,
            f"stage.seq_length={stage.seq_length} is not divisible by "
            f"parallel.tensor_model_parallel_size={tensor}, which parallel.sequence_parallel=true "
            f"asks for; use {_either([n for n in (below, above) if n > 0])}",
        )
    _require(
        stage.seq_length <= model.max_position_embeddings,
        f"stage.seq_length={stage.seq_length} is longer than "
        f"model.max_position_embeddings={model.max_position_embeddings}; shorten it, or extend "
        f"the model's context with model.max_position_embeddings={stage.seq_length}",
    )
    replicas = world_size // parallel.model_parallel_size
    step = stage.micro_batch_size * replicas
    nearest = [
        n
        for n in (stage.global_batch_size // step * step, -(-stage.global_batch_size // step) * step)
        if n > 0
    ]
    _require(
        stage.global_batch_size % step == 0,
        f"stage.global_batch_size={stage.global_batch_size} is not divisible by stage.micro_batch_size="
        f"{stage.micro_batch_size} x {replicas} data-parallel replicas = {step}; use {_either(nearest)}",
    )
    distillation = stage.distillation
    _require(
        0 <= distillation.weight <= 1,
        f"stage.distillation.weight={distillation.weight} must be between 0 (off) and 1 (no cross entropy)",
    )
    _above_zero(distillation, "stage.distillation", "temperature")
    if stage.kind is StageKind.align:
        _require(
            distillation.weight == 0,
            "stage.distillation.weight must be 0 in stage.kind=align, which has no logits; "
            "distil in stage.kind=cpt",
        )
    for reason, needed in (
        ("stage.kind=align", stage.kind is StageKind.align),
        (f"stage.distillation.weight={distillation.weight}", distillation.weight > 0),
    ):
        _require(
            not needed or stage.teacher is not None,
            f"{reason} learns from the dense source, but stage.teacher is null; "
            f"set stage.teacher=<folder of a checkpoint converted with conversion dense>",
        )


def check_optimizer(optimizer: OptimizerConfig, train_iters: int) -> None:
    """Learning rate, schedule and AdamW. Raises ConfigurationError."""
    _above_zero(optimizer, "optimizer", "lr", "adam_eps")
    _at_least(
        optimizer,
        "optimizer",
        0,
        "min_lr",
        "new_parameter_lr_mult",
        "weight_decay",
        "clip_grad",
        "lr_warmup_iters",
    )
    _require(
        optimizer.min_lr <= optimizer.lr,
        f"optimizer.min_lr={optimizer.min_lr} is above optimizer.lr={optimizer.lr}; "
        f"it is the rate at the end of the decay",
    )
    for name in ("adam_beta1", "adam_beta2"):
        beta = getattr(optimizer, name)
        _require(0 <= beta < 1, f"optimizer.{name}={beta} must be at least 0 and below 1, e.g. 0.95")
    warmup, decay = optimizer.lr_warmup_iters, optimizer.lr_wsd_decay_iters
    _require(
        warmup < train_iters,
        f"optimizer.lr_warmup_iters={warmup} must be below stage.train_iters={train_iters}: "
        f"the run would end before the warm-up does",
    )
    if optimizer.lr_decay_style is LRDecayStyle.WSD:
        _require(
            decay is not None,
            f"optimizer.lr_decay_style=WSD needs optimizer.lr_wsd_decay_iters, the steps of its final decay; "
            f"a tenth of stage.train_iters is {max(1, train_iters // 10)}",
        )
        _at_least(optimizer, "optimizer", 1, "lr_wsd_decay_iters")
        _require(
            warmup + (decay or 0) <= train_iters,
            f"optimizer.lr_wsd_decay_iters={decay} and optimizer.lr_warmup_iters={warmup} are more than "
            f"stage.train_iters={train_iters}; lr_wsd_decay_iters can be at most {train_iters - warmup}",
        )
    else:
        _require(
            decay is None,
            f"optimizer.lr_wsd_decay_iters={decay} belongs to optimizer.lr_decay_style=WSD, but the style is "
            f"{optimizer.lr_decay_style.name}; set it to null or choose optimizer=adamw_wsd",
        )


def check_platform(config: RunConfig) -> None:
    """Kernels against the accelerator that is asked for. Raises ConfigurationError."""
    cluster = config.cluster
    _above_zero(cluster, "cluster", "timeout_minutes", "peak_tflops")
    if cluster.accelerator is not AcceleratorKind.cpu:
        return
    kernels = cluster.kernels
    for name, backend, on_gpu_only in (
        ("gated_linear_attention", kernels.gated_linear_attention, {LinearAttentionBackend.fla}),
        (
            "softmax_attention",
            kernels.softmax_attention,
            {SoftmaxAttentionBackend.flash_attn, SoftmaxAttentionBackend.flex},
        ),
        ("parallel_linear", kernels.parallel_linear, {ParallelLinearBackend.transformer_engine}),
    ):
        valid = [member.name for member in type(backend) if member not in on_gpu_only]
        _require(
            backend not in on_gpu_only,
            f"cluster.kernels.{name}={backend.name} runs on GPUs only, but cluster.accelerator is cpu; "
            f"on the CPU choose {' or '.join(valid)}",
        )


def check_run_config(config: RunConfig, world_size: int) -> None:
    """Refuse a run that cannot work, before torch is imported and any process group forms.

    Args:
        config: the resolved run.
        world_size: ranks that were started (for a dry run: that the plan is for).

    Raises:
        ConfigurationError: settings that contradict each other, the world size, or the files on disk.
        CheckpointError: a checkpoint folder that is named but incomplete.
        DataError: an indexed dataset that is named but not there.
    """
    for name, number in _floats(config):
        _require(math.isfinite(number), f"{name}={number} must be a finite number")
    check_model(config.model)
    check_world_size(config.parallel, world_size)
    check_split(config.model, config.parallel)
    check_stage(config.stage, config.model, config.parallel, world_size)
    check_optimizer(config.optimizer, config.stage.train_iters)
    check_platform(config)
    _at_least(config.checkpoint, "checkpoint", 1, "save_interval", "keep_last")
    _at_least(config.logging, "logging", 1, "log_interval", "eval_iters")
    _at_least(config.logging, "logging", 0, "eval_interval")
    _at_least(config.data, "data", 0, "num_workers")
    _require(
        0 <= config.seed < 2**32,
        f"seed={config.seed} must be at least 0 and below 2**32 = {2**32}, the range of NumPy's seeds",
    )
    if not config.dry_run:
        check_files(config)
