"""The sections of a run against each other and the world size. Decides without torch, in the first second.

Every error is one ConfigurationError that names the setting and says what would be valid.
"""

from __future__ import annotations

from spikingbrain_train.architecture.layers import feed_forwards_of
from spikingbrain_train.architecture.linear_transforms import LINEAR_TRANSFORMS
from spikingbrain_train.architecture.model_checks import check_linear_transforms, check_mixers
from spikingbrain_train.architecture.trained_weights import trains_in_part, what_trains
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import (
    ParallelConfig,
)
from spikingbrain_train.config.require import either, multiples_around, require
from spikingbrain_train.config.run import LRDecayStyle, OptimizerConfig, OptimizerKind, RunConfig
from spikingbrain_train.config.setting import check_fields
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.planning.engine_checks import check_engine
from spikingbrain_train.planning.file_checks import check_files, check_train
from spikingbrain_train.planning.fp8_checks import check_fp8
from spikingbrain_train.planning.kernel_calls import check_kernels
from spikingbrain_train.planning.parallel_checks import (
    check_micro_batches,
    check_sequence_split,
    check_split,
    check_world_size,
)
from spikingbrain_train.planning.resume import StoredRun
from spikingbrain_train.planning.sparsity_checks import check_sparsity
from spikingbrain_train.planning.stages.registry import kind_of


def check_stage(stage: StageConfig, model: ModelConfig, parallel: ParallelConfig, world_size: int) -> None:
    """Batch sizes and lengths against the layout, and the teacher. Raises ConfigurationError."""
    check_sequence_split(stage.seq_length, model, parallel)
    kind = kind_of(stage)
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
    _check_ramp(stage, step)
    check_micro_batches(stage, parallel, replicas)
    kind.check(stage)
    for transform in LINEAR_TRANSFORMS:
        require(
            not (kind.trains_mixers and transform.freezes_base(model)),
            f"stage.kind={stage.kind} trains mixers, but the model {transform.words}, beside which nothing "
            f"else trains; choose another stage, or take model.{transform.name} out",
        )
    for feed_forward in feed_forwards_of(model):
        require(
            not (kind.trains_mixers and feed_forward.trained_experts(model)),
            f"stage.kind={stage.kind} trains mixers, but model.{feed_forward.name}.trained has some experts "
            f"train alone; choose another stage, or set it to []",
        )
    require(
        stage.train_iters > 0 or kind.starts_in_closed_form(stage),
        f"stage.train_iters={stage.train_iters} leaves stage.kind={stage.kind} nothing to do; give at least "
        f"1 (an align stage with stage.alignment.calibration_tokens above 0 has its closed-form start)",
    )
    require(
        stage.teacher is not None or not kind.needs_teacher(stage),
        f"{kind.reason_for_teacher(stage)} learns from the dense source, but stage.teacher is null; "
        f"set stage.teacher=<folder of a checkpoint converted with conversion dense>",
    )


def _check_sub_norm_annealing(stage: StageConfig, model: ModelConfig) -> None:
    """There are norms to come in, and they have by the end of the stage."""
    anneal_iters = stage.sub_norm_annealing.anneal_iters
    require(
        anneal_iters == 0 or model.attn_sub_norm or model.ffn_sub_norm,
        f"stage.sub_norm_annealing.anneal_iters={anneal_iters} fades sub-norms in, but model.attn_sub_norm "
        f"and model.ffn_sub_norm are false; convert the source with attn_sub_norm=true ffn_sub_norm=true, or "
        f"set it to 0",
    )
    require(
        anneal_iters <= stage.train_iters,
        f"stage.sub_norm_annealing.anneal_iters={anneal_iters} must be at most "
        f"stage.train_iters={stage.train_iters}, so that the norms are whole within the stage",
    )


def _check_ramp(stage: StageConfig, step: int) -> None:
    """Every size of a ramp divides over the ranks, and it leads to the global batch."""
    ramp, last = stage.batch_size_ramp, stage.global_batch_size
    if ramp.start is None:
        return
    increment = ramp.increment or ramp.start
    name = "increment" if ramp.increment is not None else "start"
    require(
        ramp.start < last,
        f"stage.batch_size_ramp.start={ramp.start} must be below stage.global_batch_size={last}, to which it "
        f"leads; set it to null for none",
    )
    require(
        (last - ramp.start) % increment == 0,
        f"stage.batch_size_ramp does not lead from start={ramp.start} to stage.global_batch_size={last} in "
        f"steps of stage.batch_size_ramp.{name}={increment}; give a divisor of {last - ramp.start}",
    )
    for setting, value in (("start", ramp.start), (name, increment)):
        require(
            value % step == 0,
            f"stage.batch_size_ramp.{setting}={value} is not divisible by stage.micro_batch_size x "
            f"data-parallel replicas = {step}; use {either(multiples_around(value, step))}",
        )


def check_optimizer(optimizer: OptimizerConfig, train_iters: int) -> None:
    """The schedule against the length of the run. Raises ConfigurationError."""
    warmup, decay = optimizer.lr_warmup_iters, optimizer.lr_wsd_decay_iters
    if train_iters == 0:
        return
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
        require(
            warmup + (decay or 0) <= train_iters,
            f"optimizer.lr_wsd_decay_iters={decay} and optimizer.lr_warmup_iters={warmup} are more than "
            f"stage.train_iters={train_iters}; lr_wsd_decay_iters can be at most {train_iters - warmup}",
        )


def check_matrices_train(config: RunConfig) -> None:
    """Muon has something to update. Raises ConfigurationError."""
    require(
        config.optimizer.kind is not OptimizerKind.muon or not trains_in_part(config.model),
        f"optimizer.kind=muon updates projections of all layers, but {what_trains(config.model)} train "
        f"alone; set optimizer.kind=adamw",
    )


def check_run_config(config: RunConfig, world_size: int) -> StoredRun | None:
    """Refuse a run that cannot work, before torch is imported and any process group forms.

    Args:
        config: the resolved run.
        world_size: ranks that were started (for a dry run: that the plan is for).

    Returns:
        The run that it goes on with; None where it starts, and for a dry run, which looks at no files.

    Raises:
        ConfigurationError: settings that contradict each other, the world size, or the files on disk.
        CheckpointError: a checkpoint folder that is named but incomplete.
        DataError: an indexed dataset that is named but not there.
    """
    check_fields(config)
    check_mixers(config.model)
    check_world_size(config.parallel, world_size)
    check_split(config.model, config.parallel)
    check_linear_transforms(config.model, config.stage)
    check_stage(config.stage, config.model, config.parallel, world_size)
    check_sparsity(config.stage, config.model)
    _check_sub_norm_annealing(config.stage, config.model)
    check_optimizer(config.optimizer, config.stage.train_iters)
    check_matrices_train(config)
    check_kernels(config)
    check_engine(config)
    check_fp8(config)
    if not config.dry_run:
        return check_files(config)
    require(
        0 <= config.dry_run_rank < world_size,
        f"dry_run_rank={config.dry_run_rank} is no rank of this run; choose one of 0 to {world_size - 1}",
    )
    kind_of(config.stage).check_plan(config.model, config.parallel)
    if config.data.train:  # a plan may be made before there is data
        check_train(config.data)
    return None
