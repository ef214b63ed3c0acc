"""AdamW and its schedule, as megatron-core builds them from our settings."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import LRDecayStyle, OptimizerConfig, Precision
from spikingbrain_train.models.transformer_config import PARAMS_DTYPE


def build_optimizer(
    optimizer: OptimizerConfig, parallel: ParallelConfig, precision: Precision, model: DistributedDataParallel
) -> MegatronOptimizer:
    """AdamW over the model's trainable parameters, with fp32 main weights under bf16.

    Parameter groups: norms and biases have no weight decay; parameters marked ``is_new_parameter`` (those the dense source
    does not have) learn at ``lr * new_parameter_lr_mult``.
    """
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=precision is Precision.bf16,
        params_dtype=PARAMS_DTYPE[precision],
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    overrides = {
        ParamKey(name="*.bias"): ParamGroupOverride(wd_mult=0.0),
        ParamKey(name="*norm.weight"): ParamGroupOverride(wd_mult=0.0),
    }
    if optimizer.new_parameter_lr_mult != 1.0:
        overrides[ParamKey(attr="is_new_parameter")] = ParamGroupOverride(
            max_lr=optimizer.lr * optimizer.new_parameter_lr_mult,
            min_lr=optimizer.min_lr * optimizer.new_parameter_lr_mult,
        )
    built = get_megatron_optimizer(config, [model], config_overrides=overrides, use_gloo_process_groups=False)
    _use_fused_adamw(built)
    return built


def _use_fused_adamw(optimizer: MegatronOptimizer) -> None:
    """Without Transformer Engine or Apex megatron-core takes torch's AdamW, whose default loops over tensors op by op.

    torch's fused form does the same arithmetic in one pass over memory, on CPU and GPU alike.
    """
    for inner in _torch_optimizers(optimizer):
        if isinstance(inner, torch.optim.AdamW):
            for group in inner.param_groups:
                group["fused"], group["foreach"] = True, False


def _torch_optimizers(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:
            yield part.optimizer


def build_scheduler(
    optimizer: OptimizerConfig, train_iters: int, built: MegatronOptimizer
) -> OptimizerParamScheduler:
    """The learning rate after each step: linear warm-up, then the decay; ``min_lr`` is reached at the last step."""
    return OptimizerParamScheduler(
        built,
        init_lr=0.0,
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=optimizer.lr_warmup_iters,
        lr_decay_steps=train_iters,
        lr_decay_style=optimizer.lr_decay_style.value,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=optimizer.lr_wsd_decay_iters
        if optimizer.lr_decay_style is LRDecayStyle.WSD
        else None,
        lr_wsd_decay_style=optimizer.lr_wsd_decay_style.value,
    )
