"""Muon for the matrices of hidden layers, AdamW for everything else: one optimizer over the same groups.

Momentum is orthogonalized (K. Jordan et al., "Muon", 2024) and scaled as Liu et al. do ("Muon is scalable for
LLM training", arXiv 2502.16982, section 2.2), so that an update has the root mean square of AdamW's and both
take the same rates and weight decay.

Ranks compute what one rank would. What tensor-parallel ranks split is gathered, and each keeps its own part
of the update. megatron-core's distributed optimizer cuts parameters anywhere: ranks with parts of one
matrix send each other their momentum and orthogonalize the same whole (algorithm 1 of that paper), while
matrices that lie on one rank go nowhere. Every rank so orthogonalizes its share of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.config.run import OptimizerConfig
from spikingbrain_train.ops.newton_schulz import orthogonalized
from spikingbrain_train.training.hidden_matrices import HiddenMatrix

MOMENTUM = "momentum_buffer"
"""What checkpoints call the state of a matrix."""


@dataclass(frozen=True)
class Part:
    """Elements of a parameter that lie on one rank of those that share an optimizer's state."""

    rank: int
    """Within its group."""
    start: int
    """Number of the first of them."""
    stop: int
    """Number of the first element behind them."""


@dataclass(frozen=True)
class MuonMatrix:
    """What the optimizer updates of a parameter that is a matrix, or several fused."""

    matrix: HiddenMatrix
    shape: tuple[int, ...]
    """Of the parameter on this tensor-parallel rank: [rows, columns]."""
    parts: Sequence[Part] = ()
    """Who holds which of its elements; nothing where this rank holds all."""
    group: ProcessGroup | None = None
    """Of those ranks."""

    @property
    def own(self) -> Part:
        """What lies on this rank."""
        assert self.group is not None
        return next(part for part in self.parts if part.rank == self.group.rank())


class MuonWithAdamW(torch.optim.AdamW):
    """Torch's AdamW, but for matrices, which Muon updates.

    Args:
        groups: of an AdamW of the same settings.
        matrices: ``id`` of a parameter among them (or of this rank's elements of one) -> what Muon reads.
        settings: of the run.
        dtype: in which Newton-Schulz multiplies.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        matrices: Mapping[int, MuonMatrix],
        settings: OptimizerConfig,
        dtype: torch.dtype,
    ) -> None:
        super().__init__([{"params": []}])
        for group in groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self.param_groups = groups  # as they are: elements of fp32 weights are views, which torch refuses
        self._matrices = matrices
        self._settings = settings
        self._dtype = dtype
        for group in self.param_groups:
            group.setdefault("step", 0)  # where libraries of GPUs count, and checkpoints look

    def is_matrix(self, parameter: Tensor) -> bool:
        """Whether Muon updates it."""
        return id(parameter) in self._matrices

    def begin_momentum(self, parameters: Iterable[Tensor]) -> None:
        """Give those of the parameters that are matrices the state before their first step."""
        for parameter in filter(self.is_matrix, parameters):
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                MOMENTUM: torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """AdamW's step of what is no matrix, then Muon's of the matrices."""
        assert closure is None  # megatron-core has none
        found = [
            (group, parameter, parameter.grad)
            for group in self.param_groups
            for parameter in group["params"]
            if self.is_matrix(parameter) and parameter.grad is not None
        ]
        for _, parameter, _ in found:
            parameter.grad = None  # which AdamW passes over
        super().step()
        for _, parameter, gradient in found:
            parameter.grad = gradient
        for group in self.param_groups:
            group["step"] += 1
        self._update_matrices(found)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; steps of all parameters are those of the groups, which every form of checkpoint has."""
        super().load_state_dict(state_dict)
        step = max((int(group.get("step") or 0) for group in self.param_groups), default=0)
        for group in self.param_groups:
            group["step"] = step
        for parameter, state in self.state.items():
            state["step"] = torch.tensor(float(step), device=parameter.device)

    def _update_matrices(self, found: list[tuple[dict[str, Any], Tensor, Tensor]]) -> None:
        for _, parameter, gradient in found:
            state = self.state[parameter]
            state["step"] += 1
            state[MOMENTUM].lerp_(gradient, 1 - self._settings.muon_momentum)
        shared = self._whole_updates(found)
        for group, parameter, gradient in found:
            known = self._matrices[id(parameter)]
            update = shared.pop(id(parameter), None)
            if update is None:
                update = self._update(parameter, gradient)
            update = known.matrix.apply(update.view(known.shape), self._orthogonalized)
            if known.parts:
                update = update.reshape(-1)[known.own.start : known.own.stop]
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update.view(parameter.shape), alpha=-group["lr"])

    def _update(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """What is orthogonalized: the momentum, with Nesterov's look ahead; in the dtype of the products."""
        momentum = self.state[parameter][MOMENTUM]
        if not self._settings.muon_use_nesterov:
            return momentum.to(self._dtype)
        return gradient.lerp(momentum, self._settings.muon_momentum).to(self._dtype)

    def _orthogonalized(self, matrix: Tensor) -> Tensor:
        """[rows, columns] of fp32, of a root mean square that AdamW's updates have."""
        settings = self._settings
        found = orthogonalized(matrix, settings.muon_num_ns_steps, self._dtype)
        return found.float() * (settings.muon_extra_scale_factor * max(matrix.shape) ** 0.5)

    def _whole_updates(self, found: list[tuple[dict[str, Any], Tensor, Tensor]]) -> dict[int, Tensor]:
        """``id`` of a parameter of which other ranks hold elements, too -> [elements] of all of them."""
        wholes: dict[int, Tensor] = {}
        messages = []
        for _, parameter, gradient in found:
            known = self._matrices[id(parameter)]
            if len(known.parts) < 2:
                continue
            group = known.group
            assert group is not None
            own = self._update(parameter, gradient).reshape(-1)
            whole = torch.empty(known.shape, dtype=own.dtype, device=own.device).reshape(-1)
            wholes[id(parameter)] = whole
            whole[known.own.start : known.own.stop] = own
            for part in known.parts:
                if part == known.own:
                    continue
                peer = torch.distributed.get_global_rank(group, part.rank)
                place = whole[part.start : part.stop]
                messages += [
                    torch.distributed.P2POp(torch.distributed.isend, own, peer, group),
                    torch.distributed.P2POp(torch.distributed.irecv, place, peer, group),
                ]
        if messages:
            for message in torch.distributed.batch_isend_irecv(messages):
                message.wait()
        return wholes


def use_muon(
    part: Any, found: Mapping[int, HiddenMatrix], settings: OptimizerConfig, dtype: torch.dtype
) -> None:
    """Give one of megatron-core's optimizers Muon for matrices.

    Args:
        part: built with AdamW, without steps.
        found: ``id`` of a parameter of the model -> the matrices in it.
        settings: of the run.
        dtype: in which Newton-Schulz multiplies.
    """
    matrices = {
        id(own): MuonMatrix(found[id(parameter)], tuple(parameter.shape), *_sharing(part, parameter))
        for own, parameter in _updated(part)
        if id(parameter) in found
    }
    part.optimizer = MuonWithAdamW(part.optimizer.param_groups, matrices, settings, dtype)


def _updated(part: Any) -> Iterator[tuple[Tensor, torch.nn.Parameter]]:
    """What the optimizer updates (fp32 weights, or elements of them) with the parameter of the model."""
    if isinstance(part, DistributedOptimizer):
        for parameter, (group, order) in part.model_param_group_index_map.items():
            yield part.optimizer.param_groups[group]["params"][order], parameter
        return
    groups = getattr(part, "fp32_from_float16_groups", ()), getattr(part, "float16_groups", ())
    main = {
        id(own): parameter
        for owns, parameters in zip(*groups, strict=True)
        for own, parameter in zip(owns, parameters, strict=True)
    }
    for group in part.optimizer.param_groups:
        for own in group["params"]:
            yield own, main.get(id(own), own)


def _sharing(part: Any, parameter: torch.nn.Parameter) -> tuple[Sequence[Part], ProcessGroup | None]:
    """Who holds which elements of a parameter: nothing where every rank holds all."""
    if not isinstance(part, DistributedOptimizer):
        return (), None
    (buffer,) = (each for each in part.buffers if parameter in each.param_index_map)
    start, stop, number = buffer.param_index_map[parameter]
    bucket = buffer.buckets[number]
    group = part.data_parallel_group
    share = bucket.grad_data.numel() // group.size()
    start, stop = start - bucket.offset, stop - bucket.offset
    return [
        Part(rank, max(start, rank * share) - start, min(stop, (rank + 1) * share) - start)
        for rank in range(start // share, (stop - 1) // share + 1)
    ], group
