"""torch's FSDP2 over data- and context-parallel ranks, in every one of their tensor-parallel groups.

Every parameter (of a tensor-parallel rank: its part of one) is cut along its first axis into as many parts as
there are data- and context-parallel ranks. A layer's weights are gathered when it is called and again for its
backward pass, and its gradients are reduce-scattered behind that, in every micro-batch. What lies around the
layers (embedding, final norm, output projection) is gathered once a micro-batch and stays until its backward
pass is done: losses multiply by the output projection outside the module that has it.

megatron-core's own ``TorchFullyShardedDataParallel`` is not used: its device mesh is one of CUDA devices
alone, and it shards weights in the precision of the run, without fp32 ones beside them. Under bf16 the parts
here are fp32 main weights, of which bf16 is gathered; frozen weights are kept as they are.

Parameter groups, schedule and clipping are those of :mod:`spikingbrain_train.training.optimizer`, the update
is torch's AdamW on this rank's parts, and checkpoints have megatron-core's form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from spikingbrain_train.checkpoint.expert_state import weights_with_state
from spikingbrain_train.checkpoint.partitioned_state import PartitionedState, Piece, stored_parts
from spikingbrain_train.checkpoint.sharded_state import sharded_weights
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.models.gpt_model import HybridGPTModel
from spikingbrain_train.parallel.own_part import own_part
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.runtime.bf16 import PARAMS_DTYPE
from spikingbrain_train.training.engines.engine import Engine
from spikingbrain_train.training.engines.zero_model import ZeroModel
from spikingbrain_train.training.engines.zero_weights import PartitionedWeights
from spikingbrain_train.training.optimizer import adamw_for_zero, begin_adamw_state
from spikingbrain_train.training.parameter_norm import norm_of_shares, share_of_rank

_CLIP_EPS = 1e-6
"""What megatron-core adds to a norm that it divides by."""


class FsdpModel(ZeroModel):
    """See :class:`ZeroModel`; gradients are multiplied where they lie.

    Args:
        model: the model.
        gradients: those of this rank.
    """

    def __init__(self, model: HybridGPTModel, gradients: Callable[[], list[Tensor]]) -> None:
        super().__init__(model, finish=lambda: None)  # every backward pass has reduced its own
        self._gradients = gradients

    def scale_gradients(self, scaling_factor: float | Tensor) -> None:
        """Multiply the sum of gradients over ranks."""
        torch._foreach_mul_(self._gradients(), scaling_factor)


@dataclass(frozen=True)
class _Part:
    """This rank's rows of a parameter."""

    parameter: torch.nn.Parameter
    """The part, as FSDP2 has it between forward and backward passes."""
    rows: slice
    """Which rows of the parameter it has."""
    flat: Tensor
    """[elements] its values, where they lie."""
    start: int
    """Number of the first of them among the parameter's."""

    def piece(self) -> Piece | None:
        """As checkpoints take it; None where it is empty."""
        stop = self.start + self.flat.numel()
        return Piece(self.parameter, self.start, stop, self.flat, 0) if self.flat.numel() else None


class FsdpEngine(Engine):
    """See :class:`Engine`.

    Args:
        config: the run.
        model: the model, frozen where it is not to train.
        groups: process groups: data, context and tensor parallelism.
    """

    def __init__(self, config: RunConfig, model: HybridGPTModel, groups: ProcessGroups) -> None:
        self._groups = groups
        self._clip_grad = config.optimizer.clip_grad
        self._dtype = PARAMS_DTYPE[config.precision]
        self._reshards = config.parallel.fsdp.reshard_after_forward
        modules = _units(model, of_parts=kind_of(config.stage).trains_mixers)
        self._parts: dict[str, _Part] = {}
        sharded = {id(each) for module in modules for each in module.parameters()}
        whole = [name for name, each in model.named_parameters() if id(each) not in sharded]
        weights = sharded_weights(model)
        self._weights = PartitionedWeights(
            *(model, weights, stored_parts(weights), self._dtype, self._share_of), whole=whole
        )
        with_state = stored_parts(weights_with_state(weights, model.model_config))
        stored = {name: with_state[id(each)] for name, each in model.named_parameters()}
        del weights, with_state  # which hold parameters that are to be cut
        self._units = self._shard(model, modules, whole)
        self.model = FsdpModel(model, lambda: self._gradients)
        inner = self._adamw(config)
        self._gradients = [cast(Tensor, each.grad) for each in inner.state]
        # Gradients of norms are summed over tensor-parallel ranks part by part, and not gathered for it.
        self.model.ddp_config.use_megatron_fsdp = True
        pieces = [part.piece() for part in self._parts.values() if part.parameter.requires_grad]
        self.optimizer = PartitionedState(
            inner,
            [piece for piece in pieces if piece is not None],
            {id(part.parameter): stored[name] for name, part in self._parts.items()},
            keeps_main_weights=config.precision is Precision.bf16,
            is_distributed_form=config.parallel.use_distributed_optimizer,
        )

    def _shard(
        self, model: HybridGPTModel, modules: list[torch.nn.Module], whole: Collection[str]
    ) -> list[FSDPModule]:
        """Cut the parameters of the modules, those of one after those of another, and note the parts."""
        mesh = DeviceMesh.from_group(self._groups.collection.dp_cp, self._groups.device.type)
        # What is fp32 (weights of losses, rotations) stays so: modules cast their inputs themselves.
        precision = MixedPrecisionPolicy(
            param_dtype=None if self._dtype == torch.float32 else self._dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        marks = {name: dict(vars(each)) for name, each in model.named_parameters()}
        heights = {name: each.shape[0] for name, each in model.named_parameters()}
        units = []
        for module in modules:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
            reshards = self._reshards and module is not model
            unit = fully_shard(module, mesh=mesh, reshard_after_forward=reshards, mp_policy=precision)
            unit.set_gradient_divide_factor(1.0)  # the sum, which is divided by the tokens of all ranks
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
            units.append(unit)
        if model in modules:
            # Else the first module that somebody calls by itself were the outermost one.
            cast(FSDPModule, model)._get_fsdp_state()._lazy_init()
        rank, size = mesh.get_local_rank(), mesh.size()
        for name, parameter in model.named_parameters():
            for mark, value in marks[name].items():  # FSDP2 makes parameters of its own
                setattr(parameter, mark, value)
            if name in whole:
                continue
            local = own_part(parameter)
            first = min(rank * math.ceil(heights[name] / size), heights[name])
            rows = slice(first, first + local.shape[0])
            start = first * math.prod(parameter.shape[1:])
            self._parts[name] = _Part(parameter, rows, local.view(-1), start)
        return units

    def _share_of(self, name: str) -> Piece | None:
        return self._parts[name].piece()

    def _adamw(self, config: RunConfig) -> torch.optim.AdamW:
        """Over this rank's parts; their gradients are there, and are where FSDP2 adds to them."""
        groups = adamw_for_zero(config.optimizer, config.parallel, config.precision, self.model).param_groups
        flats = {id(part.parameter): part.flat for part in self._parts.values()}
        inner = torch.optim.AdamW(
            [{**group, "params": [flats[id(each)] for each in group["params"]]} for group in groups]
        )
        for part in self._parts.values():
            if part.parameter.requires_grad:
                part.parameter.grad = torch.zeros_like(part.parameter)
                part.flat.grad = own_part(part.parameter.grad).view(-1)
        begin_adamw_state(inner, (each for group in inner.param_groups for each in group["params"]))
        return inner

    def begin_gradients(self) -> None:
        """Zero what gradients are added to."""
        torch._foreach_zero_(self._gradients)

    def gradient_norm(self) -> float:
        """See :meth:`Engine.gradient_norm`."""
        held = (
            (self._share(part.parameter), cast(Tensor, part.flat.grad))
            for part in self._parts.values()
            if part.parameter.requires_grad
        )
        return float(norm_of_shares(held, self._groups))

    def update_weights(self, check: Callable[[float], None]) -> float:
        """See :meth:`Engine.update_weights`."""
        norm = self.gradient_norm()
        check(norm)
        scale = self._clip_grad / (norm + _CLIP_EPS)
        if self._clip_grad > 0 and scale < 1:
            torch._foreach_mul_(self._gradients, scale)
        self.optimizer.optimizer.step()
        self._forget_gathered()
        return norm

    def _forget_gathered(self) -> None:
        """An evaluation leaves weights gathered, which are old behind an update."""
        for unit in self._units:
            unit.reshard()

    def gradients(self) -> Iterator[Tensor]:
        """This rank's parts."""
        return iter(self._gradients)

    def begin_state(self) -> None:
        """It has been made with the optimizer."""

    def follow_weights(self) -> None:
        """The parts of weights are the optimizer's."""

    def gather_updated_weights(self) -> None:
        """Forward passes gather what they need."""

    def _share(self, parameter: torch.nn.Parameter) -> float:
        """One over the ranks that hold the same part of a parameter."""
        is_split = getattr(parameter, "tensor_model_parallel", False)
        return 1.0 if is_split else 1.0 / self._groups.tensor_model_parallel_size

    def parameter_norm(self, groups: ProcessGroups) -> Tensor:
        """See :meth:`Engine.parameter_norm`; of what ranks compute with."""
        held = [(self._share(part.parameter), part.flat.to(self._dtype)) for part in self._parts.values()]
        for name, parameter in self.model.module.named_parameters():
            if name not in self._parts:
                held.append((share_of_rank(parameter, groups), parameter.detach()))
        return norm_of_shares(held, groups)

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """See :meth:`Engine.whole_weights`; every rank's own writes count, which are the same on all."""
        for unit in self._units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
            with torch.no_grad():
                for name, whole in self.model.module.named_parameters():
                    if name in self._parts:
                        part = self._parts[name]
                        part.flat.copy_(whole[part.rows].reshape(-1))
        finally:
            for unit in self._units:
                unit.set_reshard_after_forward(
                    self._reshards and unit is not self.model.module, recurse=False
                )
                unit.reshard()

    def state_to_save(self) -> dict[str, Any]:
        """See :meth:`Engine.state_to_save`."""
        self._forget_gathered()
        return {"model": self._weights.to_save(), "optimizer": self.optimizer.to_save()}

    def state_to_fill(self) -> dict[str, Any]:
        """See :meth:`Engine.state_to_fill`."""
        self._forget_gathered()
        return {"model": self._weights.to_fill(), "optimizer": self.optimizer.to_fill()}

    def fill_state(self, loaded: dict[str, Any]) -> None:
        """Weights first: where they are fp32, they are the main weights, too."""
        self._forget_gathered()
        self._weights.fill(loaded["model"])
        self.optimizer.fill(loaded["optimizer"])


def _units(model: HybridGPTModel, *, of_parts: bool) -> list[torch.nn.Module]:
    """What is gathered and reduced together: from the inside to the outside.

    Args:
        model: frozen where it is not to train.
        of_parts: the backward pass of a mixer or feed-forward runs by itself, in the middle of a forward pass
            of the model. Those that train are cut then, and what is frozen around them is whole.
    """
    if not of_parts:
        return [*model.layers, model]
    parts = [part for layer in model.layers for part in (layer.self_attention, layer.mlp)]
    return [part for part in parts if any(each.requires_grad for each in part.parameters())]
