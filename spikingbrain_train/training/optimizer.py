"""AdamW, or Muon beside it, and the schedule, as megatron-core builds them from our settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from spikingbrain_train.architecture.layers import layers, swapped_layers
from spikingbrain_train.checkpoint.optimizer_state import chain_of, count_steps
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import LRDecayStyle, OptimizerConfig, OptimizerKind, Precision
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.runtime.bf16 import PARAMS_DTYPE
from spikingbrain_train.runtime.optimizer_patches import checked_gradient_norm, keep_step_when_loading
from spikingbrain_train.training.hidden_matrices import hidden_matrices
from spikingbrain_train.training.muon import MuonWithAdamW, use_muon
from spikingbrain_train.training.parallel_chunks import ParallelChunks, parallel_chunks


def build_optimizer(
    optimizer: OptimizerConfig,
    parallel: ParallelConfig,
    precision: Precision,
    model: DistributedDataParallel | ParallelChunks,
) -> MegatronOptimizer:
    """AdamW over the model's trainable parameters, with fp32 main weights under bf16, or Muon for matrices.

    Parameter groups: norms, biases, branch weights and what is marked ``no_weight_decay`` have no weight
    decay; parameters marked ``is_new_parameter`` (those the dense source does not have) learn at
    ``lr * new_parameter_lr_mult``, those of mixers that replaced attention at ``lr * mixer_lr_mult``, and
    what is both at ``lr`` times either. Muon takes the rates and the weight decay of the same groups.

    Raises:
        ConfigurationError: Muon does not find the matrices of a layer.
    """
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=_last_lr(optimizer),
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
        ParamKey(name="*branch_weights"): ParamGroupOverride(wd_mult=0.0),
        ParamKey(predicate=ParamPredicate("no weight decay", _has_no_decay)): ParamGroupOverride(wd_mult=0.0),
    }
    overrides |= _rates(optimizer, _in_swapped_mixers(model))
    built = get_megatron_optimizer(
        config, parallel_chunks(model), config_overrides=overrides, use_gloo_process_groups=False
    )
    _leave_out_stubs(built)
    if optimizer.kind is OptimizerKind.muon:
        matrices = {id(parameter): matrix for parameter, matrix in hidden_matrices(model.module)}
        asked = precision if optimizer.muon_precision is Precision.auto else optimizer.muon_precision
        for part in chain_of(built):
            if part.optimizer is not None:
                use_muon(part, matrices, optimizer, PARAMS_DTYPE[asked])
    _prepare_torch_adamw(built)
    return built


def adamw_for_zero(
    optimizer: OptimizerConfig, parallel: ParallelConfig, precision: Precision, model: Any
) -> torch.optim.AdamW:
    """Torch's AdamW over the parameter groups of :func:`build_optimizer`, without state and main weights.

    Args:
        optimizer, parallel, precision: settings.
        model: wrapped; its parameters are whole.
    """
    plain = replace(parallel, use_distributed_optimizer=False, overlap_param_gather=False)
    built = build_optimizer(optimizer, plain, Precision.fp32, model)
    groups = [group for part in chain_of(built) if part.optimizer for group in part.optimizer.param_groups]
    groups = [{**group, "fused": True, "foreach": False} for group in groups]
    return torch.optim.AdamW(groups)


def begin_adamw_state(inner: torch.optim.AdamW, parameters: Iterable[torch.Tensor]) -> None:
    """Give parameters the state of torch's AdamW before its first step.

    Args:
        inner: the optimizer.
        parameters: which it updates.
    """
    for parameter in parameters:
        inner.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def _has_no_decay(parameter: torch.nn.Parameter) -> bool:
    return getattr(parameter, "no_weight_decay", False)


def _in_swapped_mixers(model: DistributedDataParallel | ParallelChunks) -> set[int]:
    """``id`` of this rank's parameters of mixers that replaced attention."""
    network: HybridGPTModel | ModelChunks = model.module
    of_the_decoder = layers(network.model_config)
    return {
        id(parameter)
        for layer in network.layers
        if swapped_layers([of_the_decoder[layer.layer_number - 1]])
        for parameter in layer.self_attention.parameters()
    }


def _rates(optimizer: OptimizerConfig, swapped: set[int]) -> dict[ParamKey, ParamGroupOverride]:
    """Groups of parameters with a rate of their own: no parameter is in two of them.

    Args:
        optimizer: settings.
        swapped: ``id`` of the parameters that mixer_lr_mult is for.
    """
    of_new, of_mixers = optimizer.new_parameter_lr_mult, optimizer.mixer_lr_mult
    found = {}
    for is_new, is_swapped in ((True, False), (False, True), (True, True)):
        multiplier = (of_new if is_new else 1.0) * (of_mixers if is_swapped else 1.0)
        if multiplier == 1.0:
            continue

        def belongs(parameter: torch.nn.Parameter, kind: tuple[bool, bool] = (is_new, is_swapped)) -> bool:
            return (getattr(parameter, "is_new_parameter", False), id(parameter) in swapped) == kind

        name = f"new {is_new}, of a swapped mixer {is_swapped}"
        found[ParamKey(predicate=ParamPredicate(name, belongs))] = ParamGroupOverride(
            max_lr=optimizer.lr * multiplier,
            min_lr=_last_lr(optimizer) * multiplier,
            # The schedule ignores it, but checkpoints tell parameter groups apart by it.
            lr_mult=multiplier,
        )
    return found


def update_weights(optimizer: MegatronOptimizer, check: Callable[[float], None]) -> float:
    """One optimizer step, unless ``check`` raises: it is told the gradient norm before anything changes.

    Args:
        optimizer: from :func:`build_optimizer`, its gradients ready.
        check: called with the norm, which is the same on every rank.

    Returns:
        Norm of all gradients before they are clipped.
    """
    assert isinstance(optimizer, ChainedOptimizer)  # it clips by the norm that it is asked for
    with checked_gradient_norm(optimizer, check) as norms:
        optimizer.step()
    return norms[0]


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Norm of all gradients, the same on every rank; nothing is updated.

    Args:
        optimizer: from :func:`build_optimizer`, its gradients ready.
    """

    class Known(Exception):
        """The norm is known, and the step goes no further."""

    norms: list[float] = []

    def stop(norm: float) -> None:
        norms.append(norm)
        raise Known

    with suppress(Known):
        update_weights(optimizer, stop)
    return norms[0]


def reported_learning_rate(optimizer: MegatronOptimizer) -> float:
    """The rate of parameters that the source already had, or of the new ones where only those train."""
    groups = optimizer.param_groups
    rates = [group["lr"] for group in groups if group["default_config"]] or [group["lr"] for group in groups]
    return rates[0] if rates else 0.0


def _last_lr(optimizer: OptimizerConfig) -> float:
    """min_lr, which a constant schedule never reaches; megatron-core still wants it below the rate."""
    constant = optimizer.lr_decay_style is LRDecayStyle.constant
    return min(optimizer.min_lr, optimizer.lr) if constant else optimizer.min_lr


def _prepare_torch_adamw(optimizer: MegatronOptimizer) -> None:
    """Choose the fused form where megatron-core, without Transformer Engine or Apex, takes torch's AdamW.

    Its default loops over tensors op by op; the fused form does the same arithmetic in one pass over memory,
    on CPU and GPU alike.

    Its state is made here, because megatron-core's distributed optimizer cannot describe (and so not load)
    one that is still empty.
    """
    for part in chain_of(optimizer):
        inner = part.optimizer
        if not isinstance(inner, torch.optim.AdamW):
            continue
        if isinstance(part, DistributedOptimizer):
            keep_step_when_loading(part)
        for group in inner.param_groups:
            group["fused"], group["foreach"] = True, False
            parameters = group["params"]
            if isinstance(inner, MuonWithAdamW):
                inner.begin_momentum(parameters)
            begin_adamw_state(inner, [each for each in parameters if each not in inner.state])
        if not inner.state:
            count_steps(inner)


def _leave_out_stubs(optimizer: MegatronOptimizer) -> None:
    """Take those without parameter groups out of a chain: that of all but experts where only these train.

    Groups are the same on every rank, whichever parameters it has.
    """
    if isinstance(optimizer, ChainedOptimizer):
        optimizer.chained_optimizers = [each for each in optimizer.chained_optimizers if each.optimizer]


class PhasedScheduler(OptimizerParamScheduler):
    """megatron-core's schedule, with another multiplier and weight decay in each later phase.

    Both follow from the step alone, so that a resumed run has them without a state of their own.

    Args:
        later_phase: multiplier of all rates and weight decay at a step, counted from 1; None in the first.
    """

    def __init__(
        self, *arguments: Any, later_phase: Callable[[int], tuple[float, float] | None], **settings: Any
    ) -> None:
        self.later_phase = later_phase  # before the rest, which asks for the first rate
        super().__init__(*arguments, **settings)

    def get_lr(self, param_group: dict) -> float:
        """The rate of a group of parameters."""
        phase, rate = self.later_phase(self.num_steps), super().get_lr(param_group)
        return rate if phase is None else phase[0] * rate

    def get_wd(self, param_group: dict | None = None) -> float:
        """Weight decay, before a group's own multiplier."""
        phase = self.later_phase(self.num_steps)
        return super().get_wd(param_group) if phase is None else phase[1]


def build_scheduler(
    optimizer: OptimizerConfig, train_iters: int, built: MegatronOptimizer
) -> OptimizerParamScheduler:
    """The learning rate after each step: linear warm-up, then the decay to ``min_lr`` at the last step.

    In later phases it is multiplied, and weight decay is another.
    """
    steps = max(train_iters, optimizer.lr_warmup_iters + 1)  # none train in a stage of no steps
    return PhasedScheduler(
        built,
        later_phase=lambda step: optimizer.later_phase(step, train_iters),
        init_lr=0.0,
        max_lr=optimizer.lr,
        min_lr=_last_lr(optimizer),
        lr_warmup_steps=optimizer.lr_warmup_iters,
        lr_decay_steps=steps,
        lr_decay_style=optimizer.lr_decay_style.value,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=optimizer.lr_wsd_decay_iters
        if optimizer.lr_decay_style is LRDecayStyle.WSD
        else None,
        lr_wsd_decay_style=optimizer.lr_wsd_decay_style.value,
    )


def scale_learning_rates(optimizer: MegatronOptimizer, factor: float) -> None:
    """Multiply the rates that the schedule has just set, as a smaller step asks for."""
    if factor != 1.0:
        for group in optimizer.param_groups:
            group["lr"] *= factor


def learning_rate_at(step: int, optimizer: OptimizerConfig, train_iters: int) -> float:
    """The rate of the ``step``-th optimizer step, counted from 1, of parameters that the source had, too."""
    nothing: Any = SimpleNamespace(param_groups=[])
    scheduler = build_scheduler(optimizer, train_iters, nothing)
    scheduler.num_steps = step
    return float(scheduler.get_lr({}))
