"""An optimizer whose every rank holds some elements of each parameter, in megatron-core's checkpoint form.

Every rank writes and reads what it has as boxes of the stored tensors
(:func:`~spikingbrain_train.checkpoint.optimizer_pieces.boxes_of`): nothing is gathered, and any
engine and number of ranks reads it. Of megatron-core's forms there are two: that of its plain optimizers, and
that of its distributed one, which keeps main weights also where weights are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from spikingbrain_train.checkpoint.optimizer_pieces import (
    OPTIMIZER_PREFIX,
    StoredPart,
    boxes_of,
    is_sharded,
    unfolded,
)

_MOMENTS = ("exp_avg", "exp_avg_sq")
_MAIN_PLAIN, _MAIN_DISTRIBUTED = "fp32_param", "param"  # as megatron-core's two forms name main weights
_PIECES = "pieces"
_STEP = "step"
_OF_EXPERTS = "is_expert_parallel"  # megatron-core's word in groups of parameters


@dataclass(frozen=True)
class Piece:
    """Elements of a parameter that lie on this rank."""

    parameter: torch.nn.Parameter
    start: int
    """Number of the first of them."""
    stop: int
    """Number of the first element behind them."""
    flat: Tensor
    """[elements] fp32, what the optimizer updates."""
    at: int
    """Where they begin in it."""


def stored_parts(weights: dict[str, Any]) -> dict[int, list[StoredPart]]:
    """``id`` of a parameter -> the tensors of a checkpoint that it is stored as.

    Args:
        weights: the model's sharded state, its parameters whole.
    """
    return {
        id(each.data): [StoredPart.of(part, each.data) for part in unfolded(each)]
        for each in nested_values(weights)
        if is_sharded(each) and isinstance(each.data, torch.nn.Parameter)
    }


class PartitionedState:
    """Torch's AdamW over flat tensors, as schedule and checkpoints see an optimizer.

    Args:
        inner: torch's optimizer; its state is there.
        pieces: what this rank holds.
        stored: how parameters are stored, from :func:`stored_parts`.
        keeps_main_weights: whether the model's own weights are not fp32.
        is_distributed_form: which of megatron-core's forms checkpoints have.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        pieces: Sequence[Piece],
        stored: dict[int, list[StoredPart]],
        *,
        keeps_main_weights: bool,
        is_distributed_form: bool,
    ) -> None:
        self._inner = inner
        self._pieces = pieces
        self._stored = stored
        self._is_distributed_form = is_distributed_form
        main = _MAIN_DISTRIBUTED if is_distributed_form else _MAIN_PLAIN
        self._names = {main, *_MOMENTS} if keeps_main_weights or is_distributed_form else set(_MOMENTS)
        self._is_wrapped = keeps_main_weights or is_distributed_form

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of torch's optimizer."""
        return self._inner.param_groups

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Torch's, whose tensors are looked through for NaN and copied before they are written."""
        return self._inner

    def to_save(self) -> dict[Any, Any]:
        """The optimizer's part of a checkpoint, from where it lies."""
        groups, step = self._inner.state_dict()["param_groups"], self._step()
        of_experts = [group for group in groups if group[_OF_EXPERTS]]
        others = [group for group in groups if not group[_OF_EXPERTS]]
        # Experts have an optimizer of their own in megatron-core.
        forms = [self._form(found, step) for found in (others, of_experts) if found]
        forms[0][_PIECES] = {number: box for number, (box, _) in enumerate(self._boxes())}
        return dict(enumerate(forms)) if len(forms) > 1 else forms[0]

    def _form(self, groups: list[dict[str, Any]], step: Tensor) -> dict[str, Any]:
        """One of megatron-core's optimizers, less its tensors."""
        if self._is_distributed_form:
            groups = [{**group, _STEP: int(step)} for group in groups]
        inner: dict[str, Any] = {"param_groups": groups}
        if not self._is_distributed_form:
            inner["state"] = {"common_step": step} if step > 0 else {}  # as megatron-core has it
        whole: dict[str, Any] = {"optimizer": inner} if self._is_wrapped else inner
        if self._is_distributed_form:
            whole["param_state_sharding_type"] = "fully_reshardable"  # as tensors of whole parameters
        return whole

    def to_fill(self) -> dict[str, Any]:
        """What to read of a checkpoint, into memory of its own."""
        return {
            _PIECES: {
                number: replace(box, data=torch.empty_like(box.data))
                for number, (box, _) in enumerate(self._boxes())
            }
        }

    def fill(self, loaded: dict[Any, Any]) -> None:
        """Take up what was read, and the number of steps."""
        with torch.no_grad():
            for number, (_, values) in enumerate(self._boxes()):
                values.copy_(loaded[_PIECES][number].reshape(-1))
            steps = [0]
            for form in [loaded] if 0 not in loaded else [loaded[0], loaded[1]]:
                inner = form.get("optimizer", form)
                steps += [group[_STEP] for group in inner["param_groups"] if group.get(_STEP) is not None]
                steps.append(inner.get("state", {}).get("common_step", 0))
            for state in self._inner.state.values():
                state[_STEP].fill_(float(max(steps)))

    def _step(self) -> Tensor:
        """[] of every parameter the same."""
        states = list(self._inner.state.values())
        return states[0][_STEP].detach().cpu().clone() if states else torch.tensor(0.0)

    def _boxes(self) -> Iterator[tuple[ShardedTensor, Tensor]]:
        """What this rank stores, and the values of each, one behind the other, where they lie."""
        for piece in self._pieces:
            state = self._inner.state[piece.flat]
            for name in sorted(self._names):
                flat = state[name] if name in _MOMENTS else piece.flat
                values = flat.detach()[piece.at : piece.at + piece.stop - piece.start]
                for stored in self._stored[id(piece.parameter)]:
                    yield from boxes_of(stored, values, piece.start, f"{OPTIMIZER_PREFIX}.{name}.")
