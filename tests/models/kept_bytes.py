"""What autograd holds on to between the forward and the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def kept_bytes(model: torch.nn.Module, kept: list[int]) -> Iterator[None]:
    """Append the bytes of all storages that autograd keeps of a block, weights aside, once it has run."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    kept.append(sum(storage.nbytes() for key, storage in storages.items() if key not in weights))
