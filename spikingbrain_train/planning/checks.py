"""The settings of a run against each other and the world size. Decides without torch, in the first second.

Every error is one ConfigurationError that names the setting and says what would be valid.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from spikingbrain_train.architecture.model_checks import check_model
from spikingbrain_train.architecture.spiking_checks import check_spiking
from spikingbrain_train.config.model import Mixer, ModelConfig
from spikingbrain_train.config.parallel import (
    AcceleratorKind,
    ExpertBackend,
    LinearAttentionBackend,
    ParallelConfig,
    ParallelLinearBackend,
    SoftmaxAttentionBackend,
)
from spikingbrain_train.config.require import above_zero, at_least, either, multiples_around, require
from spikingbrain_train.config.run import (
    LRDecayStyle,
    OptimizerConfig,
    Precision,
    RunConfig,
    StageConfig,
    StageKind,
)
from spikingbrain_train.planning.file_checks import check_files
from spikingbrain_train.planning.kernel_limits import (
    SoftmaxAttentionCall,
    flash_attn_limit,
    grouped_gemm_limit,
)
from spikingbrain_train.planning.parallel_checks import (
    check_every_stage_aligns,
    check_sequence_split,
    check_split,
    check_world_size,
)

_LARGEST = 2**32
"""Whole numbers stay below it: products of two still fit into the 64 bits of an index."""
_LONGEST_TIMEOUT = 7 * 24 * 60  # minutes


def _values(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value of a config with its dotted name; those of a list one by one."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _values(value, f"{name}.")
        else:
            yield from ((name, item) for item in (value if isinstance(value, list) else [value]))


def check_values(config: RunConfig) -> None:
    """What holds for every number and text, whatever it is for. Raises ConfigurationError."""
    for name, value in _values(config):
        if isinstance(value, float):
            require(math.isfinite(value), f"{name}={value} must be a finite number")
        elif isinstance(value, int):  # truth values are small ones
            require(
                abs(value) < _LARGEST, f"{name}={value} is too large; it must be below 2**32 = {_LARGEST}"
            )
        elif type(value) is str:
            require(
                value.strip() != "" and "\0" not in value,
                f"{name} must not be empty; give it a value, or leave it out",
            )


def check_stage(stage: StageConfig, model: ModelConfig, parallel: ParallelConfig, world_size: int) -> None:
    """Batch sizes, lengths and the teacher. Raises ConfigurationError."""
    at_least(stage, "stage", 1, "train_iters", "seq_length", "micro_batch_size", "global_batch_size")
    tokens = stage.train_iters * stage.global_batch_size * stage.seq_length
    require(
        tokens < 2**63,
        f"stage.train_iters={stage.train_iters} x stage.global_batch_size={stage.global_batch_size} x "
        f"stage.seq_length={stage.seq_length} = {tokens:.3g} tokens are more than 64 bits count; lower one",
    )
    at_least(stage.alignment, "stage.alignment", 0, "calibration_tokens")
    above_zero(stage.alignment, "stage.alignment", "calibration_ridge")
    check_sequence_split(stage.seq_length, model, parallel)
    if not stage.kind.traits.sees_sinks:
        check_sequence_split(stage.seq_length, replace(model, num_sink_tokens=0), parallel)
    require(
        stage.seq_length <= model.max_position_embeddings,
        f"stage.seq_length={stage.seq_length} is longer than "
        f"model.max_position_embeddings={model.max_position_embeddings}; shorten it, or extend "
        f"the model's context with model.max_position_embeddings={stage.seq_length}",
    )
    replicas = world_size // parallel.model_parallel_size
    step = stage.micro_batch_size * replicas
    nearest = either(multiples_around(stage.global_batch_size, step))
    require(
        stage.global_batch_size % step == 0,
        f"stage.global_batch_size={stage.global_batch_size} is not divisible by stage.micro_batch_size="
        f"{stage.micro_batch_size} x {replicas} data-parallel replicas = {step}; use {nearest}",
    )
    distillation = stage.distillation
    require(
        0 <= distillation.weight <= 1,
        f"stage.distillation.weight={distillation.weight} must be between 0 (off) and 1 (no cross entropy)",
    )
    above_zero(distillation, "stage.distillation", "temperature")
    if stage.kind is StageKind.align:
        require(
            distillation.weight == 0,
            "stage.distillation.weight must be 0 in stage.kind=align, which has no logits; "
            "distil in stage.kind=cpt",
        )
    for reason, needed in (
        (f"stage.kind={stage.kind.name}", stage.kind.traits.needs_teacher),
        (f"stage.distillation.weight={distillation.weight}", distillation.weight > 0),
    ):
        require(
            not needed or stage.teacher is not None,
            f"{reason} learns from the dense source, but stage.teacher is null; "
            f"set stage.teacher=<folder of a checkpoint converted with conversion dense>",
        )


def check_optimizer(optimizer: OptimizerConfig, train_iters: int) -> None:
    """Learning rate, schedule and AdamW. Raises ConfigurationError."""
    above_zero(optimizer, "optimizer", "lr", "adam_eps")
    at_least(
        optimizer,
        "optimizer",
        0,
        "min_lr",
        "new_parameter_lr_mult",
        "weight_decay",
        "clip_grad",
        "lr_warmup_iters",
    )
    require(
        optimizer.lr_decay_style is LRDecayStyle.constant or optimizer.min_lr <= optimizer.lr,
        f"optimizer.min_lr={optimizer.min_lr} is above optimizer.lr={optimizer.lr}; "
        f"it is the rate at the end of the decay",
    )
    for name in ("adam_beta1", "adam_beta2"):
        beta = getattr(optimizer, name)
        require(0 <= beta < 1, f"optimizer.{name}={beta} must be at least 0 and below 1, e.g. 0.95")
    warmup, decay = optimizer.lr_warmup_iters, optimizer.lr_wsd_decay_iters
    require(
        warmup < train_iters,
        f"optimizer.lr_warmup_iters={warmup} must be below stage.train_iters={train_iters}: "
        f"the run would end before the warm-up does",
    )
    if optimizer.lr_decay_style is LRDecayStyle.WSD:
        require(
            decay is not None,
            f"optimizer.lr_decay_style=WSD needs optimizer.lr_wsd_decay_iters, the steps of its final decay; "
            f"a tenth of stage.train_iters is {max(1, train_iters // 10)}",
        )
        at_least(optimizer, "optimizer", 1, "lr_wsd_decay_iters")
        require(
            warmup + (decay or 0) <= train_iters,
            f"optimizer.lr_wsd_decay_iters={decay} and optimizer.lr_warmup_iters={warmup} are more than "
            f"stage.train_iters={train_iters}; lr_wsd_decay_iters can be at most {train_iters - warmup}",
        )
    else:
        require(
            decay is None,
            f"optimizer.lr_wsd_decay_iters={decay} belongs to optimizer.lr_decay_style=WSD, but the style is "
            f"{optimizer.lr_decay_style.name}; set it to null or choose optimizer=adamw_wsd",
        )


def check_platform(config: RunConfig) -> None:
    """Kernels against the accelerator that is asked for. Raises ConfigurationError."""
    cluster = config.cluster
    above_zero(cluster, "cluster", "timeout_minutes", "peak_tflops")
    _check_kernels(config)
    require(
        cluster.timeout_minutes <= _LONGEST_TIMEOUT,
        f"cluster.timeout_minutes={cluster.timeout_minutes} must be at most {_LONGEST_TIMEOUT}, a week",
    )
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
        ("experts", kernels.experts, {ExpertBackend.transformer_engine, ExpertBackend.grouped_gemm}),
    ):
        valid = [member.name for member in type(backend) if member not in on_gpu_only]
        require(
            backend not in on_gpu_only,
            f"cluster.kernels.{name}={backend.name} runs on GPUs only, but cluster.accelerator is cpu; "
            f"on the CPU choose {' or '.join(valid)}",
        )


def _check_kernels(config: RunConfig) -> None:
    """Kernels asked for by name against what the network needs of them."""
    kernels, model = config.cluster.kernels, config.model
    if kernels.experts is ExpertBackend.grouped_gemm:
        limit = grouped_gemm_limit(config.precision, model.spiking)
        require(
            limit is None,
            f"cluster.kernels.experts=grouped_gemm {limit}; choose cluster.kernels.experts=sequential or "
            f"auto",
        )
    if kernels.softmax_attention is not SoftmaxAttentionBackend.flash_attn:
        return
    for branch in {branch for mixer in model.layer_mixers() if (branch := mixer.softmax_branch)}:
        limit = flash_attn_limit(
            SoftmaxAttentionCall(
                dtype="float32" if config.precision is Precision.fp32 else "bfloat16",
                key_dim=model.kv_channels,
                value_dim=model.kv_channels,
                num_text_keys=config.stage.seq_length,
                window=model.window_of(branch),
                num_sink_tokens=model.num_sink_tokens,
            )
        )
        require(
            limit is None,
            f"cluster.kernels.softmax_attention=flash_attn {limit}; choose auto, which takes it where it can",
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
    check_values(config)
    check_model(config.model)
    check_world_size(config.parallel, world_size)
    check_split(config.model, config.parallel)
    check_spiking(config.model, config.stage)
    check_stage(config.stage, config.model, config.parallel, world_size)
    check_optimizer(config.optimizer, config.stage.train_iters)
    check_platform(config)
    at_least(config.checkpoint, "checkpoint", 1, "save_interval", "keep_last")
    at_least(config.logging, "logging", 1, "log_interval", "eval_iters")
    at_least(config.logging, "logging", 0, "eval_interval")
    at_least(config.data, "data", 0, "num_workers")
    require(
        0 <= config.seed < 2**32,
        f"seed={config.seed} must be at least 0 and below 2**32 = {2**32}, the range of NumPy's seeds",
    )
    if not config.dry_run:
        check_files(config)
    else:
        require(
            0 <= config.dry_run_rank < world_size,
            f"dry_run_rank={config.dry_run_rank} is no rank of this run; choose one of 0 to {world_size - 1}",
        )
        dense = [Mixer.full] * config.model.num_layers
        if config.stage.kind is StageKind.align and config.model.layer_mixers() != dense:
            check_every_stage_aligns(config.model, dense, config.parallel)  # plans read no teacher
