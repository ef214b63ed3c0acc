"""DeepSpeed's ZeRO 1 and 2 over data- and context-parallel ranks (Rajbhandari et al., arXiv 1910.02054).

Parameter groups, schedule and clipping are those of :mod:`spikingbrain_train.training.optimizer`, the update
is torch's AdamW on this rank's share, and checkpoints have megatron-core's form. Gradients are accumulated
and summed in fp32. DeepSpeed divides sums over ranks by the number of ranks, and a step's loss is a mean over
all its tokens: the factor between the two travels as DeepSpeed's loss scale, which it takes out of gradients
and of their norm before they are clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from spikingbrain_train.checkpoint.expert_state import weights_with_state
from spikingbrain_train.checkpoint.optimizer_pieces import StoredPart
from spikingbrain_train.checkpoint.partitioned_state import PartitionedState, Piece, stored_parts
from spikingbrain_train.checkpoint.sharded_state import fill_weights, sharded_weights
from spikingbrain_train.config.parallel import KEPT_WEIGHTS, REDUCE_BUCKET, WEIGHTS_STAGE
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.models.gpt_model import HybridGPTModel
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.runtime.deepspeed import import_deepspeed
from spikingbrain_train.training.engines.engine import Engine
from spikingbrain_train.training.engines.zero_model import ZeroModel
from spikingbrain_train.training.engines.zero_partitions import partitions_of
from spikingbrain_train.training.optimizer import adamw_for_zero, begin_adamw_state

_FIRST_MICRO_BATCH = -1
"""How DeepSpeed counts micro-batches whose gradients it adds up in host memory."""


def zero_settings(config: RunConfig, trainable: int) -> dict[str, Any]:
    """The run as DeepSpeed's configuration has it.

    Args:
        config: the run.
        trainable: parameters that train.
    """
    parallel, zero = config.parallel, config.parallel.zero
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.stage.micro_batch_size,
        "managed_gradient_accumulation": False,  # a step ends where the stage says so, whatever its size
        "gradient_clipping": config.optimizer.clip_grad,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, not one that DeepSpeed compiles
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision is Precision.bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": zero.stage,
            "overlap_comm": parallel.overlap_grad_reduce,
            "reduce_bucket_size": min(trainable, REDUCE_BUCKET),
        },
    }
    if zero.stage == WEIGHTS_STAGE:
        at_once = min(trainable, REDUCE_BUCKET)
        settings["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,  # every weight is spread
            "stage3_max_live_parameters": int(at_once * KEPT_WEIGHTS),
            "stage3_max_reuse_distance": int(at_once * KEPT_WEIGHTS),
            "stage3_prefetch_bucket_size": int(at_once * (1 - KEPT_WEIGHTS)),
        }
    if zero.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": torch.cuda.is_available(),
        }
    return settings


class DeepSpeedEngine(Engine):
    """See :class:`Engine`.

    Args:
        config: the run.
        model: the model, frozen where it is not to train.
        groups: process groups: data and context parallelism alone, so that all ranks hold the same weights.
    """

    def __init__(self, config: RunConfig, model: HybridGPTModel, groups: ProcessGroups) -> None:
        deepspeed = import_deepspeed(groups.accelerator)
        self._world_size = groups.world_size
        self._stage = config.parallel.zero.stage
        self._is_offloaded = config.parallel.zero.offload_optimizer
        weights = sharded_weights(model)
        stored = stored_parts(weights)
        with_state = stored_parts(weights_with_state(weights, model.model_config))
        self._before_partitioning(model, weights, stored, groups.rank)
        del weights  # which may hold views of parameters that are to be cut
        self.model = ZeroModel(model, self._finish_gradients)
        trainable = sum(each.numel() for each in model.parameters() if each.requires_grad)
        inner = adamw_for_zero(config.optimizer, config.parallel, config.precision, self.model)
        for parameter in model.parameters():
            # megatron-core's mark of experts, here whole as all else. DeepSpeed would take it for its own
            # and look for expert-parallel groups that it had made.
            parameter.allreduce = True
        _, self._zero, _, _ = deepspeed.initialize(
            model=model, optimizer=inner, config=zero_settings(config, trainable), dist_init_required=False
        )
        self._zero.register_grad_acc_post_hook(self._begin_backward)
        begin_adamw_state(inner, self._main_weights())
        self._show_main_weights()
        self.optimizer = PartitionedState(
            inner,
            self._pieces(groups),
            with_state,
            keeps_main_weights=config.precision is Precision.bf16,
            is_distributed_form=config.parallel.use_distributed_optimizer,
        )

    def _before_partitioning(
        self, model: HybridGPTModel, weights: dict[str, Any], stored: dict[int, list[StoredPart]], rank: int
    ) -> None:
        """Here they lie on every rank whole, as ZeRO 1 and 2 leave them."""

    def _main_weights(self) -> list[Tensor]:
        """[elements] fp32 each, which this rank updates."""
        main: list[Tensor] = self._zero.single_partition_of_fp32_groups
        return main

    def _pieces(self, groups: ProcessGroups) -> list[Piece]:
        """What of which parameter lies in them."""
        return partitions_of(self._zero, groups.rank)

    def _show_main_weights(self) -> None:
        """Have AdamW's groups name them, which ZeRO 1 and 2 always do."""

    def begin_gradients(self) -> None:
        """Drop what an update that was left out has not used, too."""
        zero = self._zero
        self.model.scaling = 1.0
        zero.zero_grad(set_to_none=True)
        zero._release_preflattened_grad_buffers()
        zero.micro_step_id = _FIRST_MICRO_BATCH
        if self._is_offloaded:
            zero._offload_accumulated_param_ids = set()
            zero.reset_cpu_buffers()
            for partition in zero.single_partition_of_fp32_groups:
                partition.grad.zero_()
        for number in range(len(zero.bit16_groups)):
            zero.averaged_gradients[number] = zero.all_grad_tensors[number] = None
        zero.custom_loss_scaler = False
        zero.set_gradient_accumulation_boundary(False)
        self._begin_backward()

    def _begin_backward(self) -> None:
        """Let the next call of autograd be one that DeepSpeed reduces behind, whoever makes it."""
        self._zero.clear_backward_seen_flag()
        self._zero._backward_seen_this_step = True

    def _finish_gradients(self) -> None:
        """Sum over ranks what is not yet, and lay this rank's share out as the update takes it."""
        self._zero.set_gradient_accumulation_boundary(True)
        if self._stage == 1:
            self._zero.reduce_gradients()
        else:
            self._zero.finalize_gradient_accumulation_boundary()

    def gradient_norm(self) -> float:
        """See :meth:`Engine.gradient_norm`."""
        # DeepSpeed has averaged over ranks, so that a sum's factor is larger by their number.
        self._zero.override_loss_scale(1.0 / (self.model.scaling * self._world_size))
        norm = float(self._zero.scaled_global_norm()) / self._zero.loss_scale
        return norm if norm >= 0 else math.nan  # it reports what is not finite as -1

    def update_weights(self, check: Callable[[float], None]) -> float:
        """See :meth:`Engine.update_weights`."""
        norm = self.gradient_norm()
        check(norm)
        self._zero.step()
        return norm

    def gradients(self) -> Iterator[Tensor]:
        """This rank's share, group after group."""
        zero = self._zero
        for number, partition in enumerate(zero.single_partition_of_fp32_groups):
            if self._is_offloaded:
                yield partition.grad
            else:
                yield from zero.averaged_gradients[number] or ()

    def begin_state(self) -> None:
        """It has been made with the optimizer."""

    def follow_weights(self) -> None:
        """See :meth:`Engine.follow_weights`."""
        self._zero.refresh_fp32_params()

    def gather_updated_weights(self) -> None:
        """An update has gathered them."""

    def state_to_save(self) -> dict[str, Any]:
        """See :meth:`Engine.state_to_save`."""
        return {"model": sharded_weights(self.model.module), "optimizer": self.optimizer.to_save()}

    def state_to_fill(self) -> dict[str, Any]:
        """See :meth:`Engine.state_to_fill`."""
        return {"model": sharded_weights(self.model.module), "optimizer": self.optimizer.to_fill()}

    def fill_state(self, loaded: dict[str, Any]) -> None:
        """Weights first: where they are fp32, they are the main weights, too."""
        fill_weights(self.model.module, loaded["model"])
        self.follow_weights()
        self.optimizer.fill(loaded["optimizer"])
