"""Copies of a run's state in host memory, from which a checkpoint is written while the run goes on."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.utils import _pytree as pytree

from spikingbrain_train.checkpoint.optimizer_state import chain_of
from spikingbrain_train.parallel.own_part import own_part


class HostCopies:
    """Memory for copies, touched once and used by one save after the other.

    Memory that is new costs several times what the copying does, so what a save has used is kept for the
    next one, whose tensors are the same in number and shape. Copied is what lies where the run changes it:
    whatever was gathered or fetched from a GPU for this save is the save's own already.

    Args:
        model: this rank's pipeline stage, a module.
        optimizer: its optimizer.
    """

    def __init__(self, model: Any, optimizer: MegatronOptimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._free: dict[tuple[torch.dtype, torch.Size], list[torch.Tensor]] = {}
        self._used: list[torch.Tensor] = []

    def take(self, sharded: dict[str, Any]) -> None:
        """Put copies in place of what this rank writes of the model and the optimizer and lies on the host.

        megatron-core would copy most of it, too, where it finds it to be a part of a larger buffer, into new
        memory and before the run may go on.

        What an earlier call gave is overwritten: the save that it was for has ended.

        Args:
            sharded: sharded tensors and plain values, changed in place.
        """
        for copy in self._used:
            self._free.setdefault((copy.dtype, copy.shape), []).append(copy)
        self._used = []
        live = self._storages()

        apply_factories(sharded)
        for value in nested_values(sharded):
            if isinstance(value, ShardedTensor) and is_main_replica(value.replica_id):
                data = value.data
                if data is not None and data.device.type == "cpu" and _storage(data) in live:
                    value.data = self._copy(data)
        self._free = {}  # what no tensor has the shape of any more

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        free = self._free.get((tensor.dtype, tensor.shape))
        copy = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype)
        self._used.append(copy)
        return copy.copy_(tensor.detach())

    def _storages(self) -> set[int]:
        tensors = [*map(own_part, self._model.parameters()), *self._model.buffers()]
        for part in chain_of(self._optimizer):
            tensors += [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
            tensors += pytree.tree_leaves(dict(part.optimizer.state))
        return {_storage(each) for each in tensors if isinstance(each, torch.Tensor)}


def _storage(tensor: torch.Tensor) -> int:
    """Where the memory of a tensor begins, whatever part of it the tensor shows."""
    return tensor.untyped_storage().data_ptr()
