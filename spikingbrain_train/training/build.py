"""Builds the models of a run: the one that trains and the frozen dense source it may learn from."""

from __future__ import annotations

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.checkpoint.loading import load_weights
from spikingbrain_train.config.fp8 import Fp8Config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import KernelConfig, ParallelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks, build_model
from spikingbrain_train.models.kernels import resolve_kernels
from spikingbrain_train.models.transformer_config import transformer_config
from spikingbrain_train.models.weight_gradients import add_within_products
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.runtime.accelerator import Accelerator
from spikingbrain_train.runtime.fp8 import require_fp8
from spikingbrain_train.storage.checkpoint_folder import latest_checkpoint
from spikingbrain_train.training.current_weights import gather_before_reading
from spikingbrain_train.training.frozen_base import begin_new_weights
from spikingbrain_train.training.parallel_chunks import ParallelChunks


def kernels_of(config: RunConfig, accelerator: Accelerator) -> KernelConfig:
    """The backends of a run's modules, each ``auto`` settled."""
    return resolve_kernels(
        config.cluster.kernels,
        accelerator,
        model=config.model,
        precision=config.precision,
        in_fp8=config.fp8.format is not None,
        parallel=config.parallel,
    )


def build_student(
    config: RunConfig, kernels: KernelConfig, groups: ProcessGroups, *, resuming: bool = False
) -> HybridGPTModel | ModelChunks:
    """The model that trains, from ``checkpoint.load`` or from random weights.

    Where ``resuming``, its weights are the checkpoint's of the run, which are read later.

    Raises:
        PlatformError: the run multiplies in FP8, which this machine does not.
    """
    require_fp8(config.fp8, kernels, groups.accelerator)
    checkpoint = config.checkpoint.load
    model = _build(config.model, config, kernels, groups, initialize=checkpoint is None, fp8=config.fp8)
    begin_new_weights(model, config.seed)
    if checkpoint is not None and not resuming:
        load_weights(checkpoint, "checkpoint.load", model)
    return model


def build_teacher(
    config: RunConfig, kernels: KernelConfig, groups: ProcessGroups
) -> HybridGPTModel | ModelChunks:
    """The frozen dense source from ``stage.teacher``, in the same topology and precision, without FP8."""
    assert config.stage.teacher is not None  # planning.checks asks for it where a stage needs it
    checkpoint = latest_checkpoint(config.stage.teacher, "stage.teacher")
    model = read_stored_model(checkpoint)
    teacher = _build(model, config, kernels, groups, initialize=False)
    load_weights(config.stage.teacher, "stage.teacher", teacher)
    return teacher.requires_grad_(False).eval()


def _build(
    model: ModelConfig,
    config: RunConfig,
    kernels: KernelConfig,
    groups: ProcessGroups,
    *,
    initialize: bool,
    fp8: Fp8Config | None = None,
) -> HybridGPTModel | ModelChunks:
    megatron_config = transformer_config(
        model,
        config.parallel,
        config.precision,
        on_cpu=not groups.accelerator.is_gpu,
        initialize=initialize,
        fp8=fp8,
    )
    return build_model(model, megatron_config, kernels, groups.device, config.parallel.context_parallel)


def wrap_data_parallel(
    model: HybridGPTModel | ModelChunks, parallel: ParallelConfig
) -> DistributedDataParallel | ParallelChunks:
    """megatron-core's data parallelism: fp32 gradients, summed over replicas and divided by tokens later."""
    model.config.calculate_per_token_loss = True
    model.config.finalize_model_grads_func = finalize_model_grads
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    wrapped = [
        # Those behind the first chunk hide their communication behind the others' work as a whole.
        DistributedDataParallel(model.config, ddp_config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(model.chunks)
    ]
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        model.config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    if parallel.overlap_param_gather:
        start = [chunk.start_param_sync for chunk in wrapped]
        model.config.param_sync_func = start if len(wrapped) > 1 else start[0]
        for chunk in wrapped:
            gather_before_reading(chunk)
    for chunk in wrapped:
        chunk.broadcast_params()
    add_within_products(model)
    return wrapped[0] if isinstance(model, HybridGPTModel) else ParallelChunks(model, wrapped)


def describe_parameters(model: torch.nn.Module) -> str:
    """How many parameters the first rank has, all and those that train: for run_details.txt."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"rank 0 holds {total:,} parameters, {trainable:,} of them trainable"
