"""DeepSpeed's ZeRO 3: weights, too, lie on one rank each and are gathered for the modules that use them.

A module's weights are gathered when it is called and again when its backward pass begins, and every rank's
part of a gradient is added up in fp32. The output projection alone stays whole on every rank between updates:
losses multiply by it outside the module that has it, which with a tied one is the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from spikingbrain_train.checkpoint.optimizer_pieces import StoredPart
from spikingbrain_train.checkpoint.partitioned_state import Piece
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.models.gpt_model import HybridGPTModel
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.training.engines.deepspeed import DeepSpeedEngine
from spikingbrain_train.training.engines.zero_weights import PartitionedWeights, share_of

_ADDED_UP = 1
"""A micro-batch whose gradients DeepSpeed adds to what is there, which begins at zero."""

_IN_USE = -1
"""No module has this number; what it uses is not released."""


class ZeroThreeEngine(DeepSpeedEngine):
    """See :class:`DeepSpeedEngine`."""

    def __init__(self, config: RunConfig, model: HybridGPTModel, groups: ProcessGroups) -> None:
        super().__init__(config, model, groups)
        self._output = cast(Any, model.output_weight())  # with what DeepSpeed gave it
        self._output.ds_persist = True  # so that no trace of modules has it released
        self._keep_output()

    def _keep_output(self) -> None:
        """Have the output projection, which losses read outside the model's forward pass, whole again."""
        self._output.all_gather()
        self._output.ds_active_sub_modules.add(_IN_USE)

    def _before_partitioning(
        self, model: HybridGPTModel, weights: dict[str, Any], stored: dict[int, list[StoredPart]], rank: int
    ) -> None:
        parameters = dict(model.named_parameters())
        dtype = model.config.params_dtype
        self._weights = PartitionedWeights(
            model, weights, stored, dtype, lambda name: share_of(parameters[name], rank)
        )

    def _main_weights(self) -> list[Any]:
        main: list[Any] = self._zero.fp32_partitioned_groups_flat
        return main

    def _pieces(self, groups: ProcessGroups) -> list[Piece]:
        pieces = []
        for parameters, flat in zip(self._zero.fp16_groups, self._main_weights(), strict=True):
            at = 0
            for parameter in parameters:
                share = share_of(parameter, groups.rank)
                if share is not None:
                    pieces.append(Piece(parameter, share.start, share.stop, flat, at))
                at += parameter.partition_numel()
        return pieces

    def _show_main_weights(self) -> None:
        """DeepSpeed shows AdamW its weights while it updates alone; a checkpoint asks at other times."""
        self._zero._clear_fp32_optimizer_param_groups()
        self._zero._set_fp32_optimizer_param_groups()

    def begin_gradients(self) -> None:
        """See :meth:`Engine.begin_gradients`."""
        zero = self._zero
        self.model.scaling = 1.0
        zero.zero_grad(set_to_none=True)
        zero.grad_partitions_flat_buffer.zero_()
        for bucket in zero.ipg_buckets.values():
            bucket.clear_params()
        zero.averaged_gradients = {}
        zero._offload_boundary_param_ids = set()
        if self._is_offloaded:
            zero.reset_cpu_buffers()
            for partition in self._main_weights():
                partition.grad.zero_()
        zero.micro_step_id = _ADDED_UP
        zero.custom_loss_scaler = False
        zero.set_gradient_accumulation_boundary(False)
        self._begin_backward()

    def _finish_gradients(self) -> None:
        self._zero.independent_gradient_partition_epilogue()
        self._zero.finalize_gradient_accumulation_boundary()

    def gradient_norm(self) -> float:
        """See :meth:`Engine.gradient_norm`."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        self._zero.override_loss_scale(1.0 / (self.model.scaling * self._world_size))
        norm = float(combine_grad_norm_groups(self._zero._get_norm_groups())) / self._zero.loss_scale
        return norm if math.isfinite(norm) else math.nan

    def update_weights(self, check: Callable[[float], None]) -> float:
        """See :meth:`Engine.update_weights`."""
        norm = self.gradient_norm()
        check(norm)
        # It shows AdamW one group of them after the other.
        self._zero._clear_fp32_optimizer_param_groups()
        self._zero.step()
        self._show_main_weights()
        self._keep_output()
        return norm

    def gradients(self) -> Iterator[Tensor]:
        """This rank's share, group after group."""
        for number, partition in enumerate(self._main_weights()):
            if self._is_offloaded:
                yield partition.grad
            else:
                yield from self._zero.averaged_gradients.get(number) or ()

    def parameter_norm(self, groups: ProcessGroups) -> Tensor:
        """See :meth:`Engine.parameter_norm`."""
        total = torch.zeros((), dtype=torch.float64, device=groups.device)
        for parameter in self.model.parameters():
            share = share_of(parameter, groups.rank)
            if share is not None:
                total += share.flat.double().square().sum()
        torch.distributed.all_reduce(total)
        return total.sqrt()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """See :meth:`Engine.whole_weights`; of what ranks wrote, that of the first counts."""
        from deepspeed.runtime.zero import GatheredParameters

        parameters: list[Any] = list(self.model.parameters())
        with GatheredParameters(parameters, modifier_rank=0):
            for parameter in parameters:
                parameter.ds_active_sub_modules.add(_IN_USE)
            try:
                yield
            finally:
                for parameter in parameters:
                    parameter.ds_active_sub_modules.discard(_IN_USE)
        self._keep_output()

    def state_to_save(self) -> dict[str, Any]:
        """See :meth:`Engine.state_to_save`."""
        return {"model": self._weights.to_save(), "optimizer": self.optimizer.to_save()}

    def state_to_fill(self) -> dict[str, Any]:
        """See :meth:`Engine.state_to_fill`."""
        return {"model": self._weights.to_fill(), "optimizer": self.optimizer.to_fill()}

    def fill_state(self, loaded: dict[str, Any]) -> None:
        """See :meth:`Engine.fill_state`."""
        self._zero._partition_all_parameters()
        self._weights.fill(loaded["model"])
        self._keep_output()
        self.follow_weights()
        self.optimizer.fill(loaded["optimizer"])
