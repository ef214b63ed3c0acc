"""Weights of which every rank holds a part, in the form that checkpoints have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from spikingbrain_train.checkpoint.optimizer_pieces import StoredPart, boxes_of
from spikingbrain_train.checkpoint.partitioned_state import Piece

_PIECES = "pieces"


class PartitionedWeights:
    """The weights of a model as ZeRO 3 spreads them: this rank's elements of each, and its buffers.

    Made while the parameters are whole.

    Args:
        model: the model.
        weights: its sharded state.
        stored: how its parameters are stored.
        rank: of this process among those that share it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        weights: dict[str, Any],
        stored: dict[int, list[StoredPart]],
        rank: int,
    ) -> None:
        self._model = model
        self._rank = rank
        self._stored = [(each, stored[id(each)]) for each in model.parameters()]
        self._others: dict[str, ShardedTensor] = {
            name: replace(sharded, data=None)
            for name, sharded in weights.items()
            if not isinstance(sharded.data, torch.nn.Parameter)
        }

    def to_save(self) -> dict[str, Any]:
        """This rank's share, in memory of its own, and the buffers."""
        boxes = {n: replace(box, data=box.data.clone()) for n, (box, _) in enumerate(self._boxes())}
        return {_PIECES: boxes, **self._buffers()}

    def to_fill(self) -> dict[str, Any]:
        """What to read of a checkpoint, into memory of its own."""
        boxes = {n: replace(box, data=torch.empty_like(box.data)) for n, (box, _) in enumerate(self._boxes())}
        return {_PIECES: boxes, **self._buffers()}

    def fill(self, loaded: dict[str, Any]) -> None:
        """Take up what was read."""
        with torch.no_grad():
            for number, (_, values) in enumerate(self._boxes()):
                values.copy_(loaded[_PIECES][number].reshape(-1))
            buffers = dict(self._model.named_buffers())
            for name in self._others:
                buffers[name].copy_(loaded[name])

    def _buffers(self) -> dict[str, ShardedTensor]:
        buffers = dict(self._model.named_buffers())
        return {name: replace(sharded, data=buffers[name]) for name, sharded in self._others.items()}

    def _boxes(self) -> Iterator[tuple[ShardedTensor, Tensor]]:
        for parameter, parts in self._stored:
            piece = share_of(parameter, self._rank)
            if piece is None:
                continue
            for part in parts:
                yield from boxes_of(part, piece.flat, piece.start, "")


def share_of(parameter: Any, rank: int) -> Piece | None:
    """This rank's elements of a parameter that DeepSpeed has partitioned; None where it has none.

    Every parameter is cut by itself into as many parts as there are ranks, the last ones padded.
    """
    size, whole = parameter.ds_tensor.numel(), parameter.ds_numel
    start = rank * size
    stop = min(start + size, whole)
    if start >= stop:
        return None
    return Piece(parameter, start, stop, parameter.ds_tensor.detach()[: stop - start], 0)
