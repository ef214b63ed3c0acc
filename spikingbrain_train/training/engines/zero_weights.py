"""Weights of which every rank holds a part, in the form that checkpoints have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from spikingbrain_train.checkpoint.optimizer_pieces import StoredPart, boxes_of
from spikingbrain_train.checkpoint.partitioned_state import Piece

_PIECES = "pieces"


class PartitionedWeights:
    """The weights of a model as an engine spreads them: this rank's elements of each, and what is whole.

    Made while the parameters are whole.

    Args:
        model: the model.
        weights: its sharded state.
        stored: how its parameters are stored.
        dtype: what checkpoints have weights in.
        share_of: this rank's elements of the parameter of a name; None where it has none.
        whole: names of parameters that stay whole on every rank.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        weights: dict[str, Any],
        stored: dict[int, list[StoredPart]],
        dtype: torch.dtype,
        share_of: Callable[[str], Piece | None],
        whole: Collection[str] = (),
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._share_of = share_of
        spread = {name: each for name, each in model.named_parameters() if name not in whole}
        self._stored = [(name, stored[id(each)]) for name, each in spread.items()]
        left = {id(each) for each in spread.values()}
        self._others: dict[str, ShardedTensor] = {
            name: replace(sharded, data=None)
            for name, sharded in weights.items()
            if id(sharded.data) not in left
        }

    def to_save(self) -> dict[str, Any]:
        """This rank's share, in memory of its own, and what is whole."""
        boxes = {
            n: replace(box, data=box.data.to(self._dtype, copy=True), dtype=self._dtype)
            for n, (box, _) in enumerate(self._boxes())
        }
        return {_PIECES: boxes, **self._wholes()}

    def to_fill(self) -> dict[str, Any]:
        """What to read of a checkpoint, into memory of its own."""
        boxes = {
            n: replace(box, data=torch.empty_like(box.data, dtype=self._dtype), dtype=self._dtype)
            for n, (box, _) in enumerate(self._boxes())
        }
        return {_PIECES: boxes, **self._wholes()}

    def fill(self, loaded: dict[str, Any]) -> None:
        """Take up what was read."""
        with torch.no_grad():
            for number, (_, values) in enumerate(self._boxes()):
                values.copy_(loaded[_PIECES][number].reshape(-1))
            tensors = self._tensors()
            for name in self._others:
                tensors[name].copy_(loaded[name])

    def _wholes(self) -> dict[str, ShardedTensor]:
        tensors = self._tensors()
        return {name: replace(sharded, data=tensors[name]) for name, sharded in self._others.items()}

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self._model.named_buffers()), **dict(self._model.named_parameters())}

    def _boxes(self) -> Iterator[tuple[ShardedTensor, Tensor]]:
        for name, parts in self._stored:
            piece = self._share_of(name)
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
