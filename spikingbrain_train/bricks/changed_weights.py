"""Which weights of a checkpoint a run has changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch

from spikingbrain_train.architecture.lora import adapter_of
from spikingbrain_train.architecture.weights import Shape
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.conversion.mapping import Parameter, model_parameters
from spikingbrain_train.conversion.megatron_source import read_model
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint

_Region = tuple[Shape, Shape]
"""Where a part of a parameter begins, and its shape."""


def check_only_adapter_changed(before: Path, after: Path, name: str) -> int:
    """Hold every weight that is not of an adapter against what it was.

    Args:
        before: checkpoint, or a run's folder, whose newest is taken.
        after: the same of the result.
        name: of the adapter.

    Returns:
        Number of weights that are the same bit for bit: all others.

    Raises:
        CheckpointError: another weight has changed, or a checkpoint cannot be read.
    """

    def others(parameter: Parameter) -> list[_Region]:
        return [] if adapter_of(parameter.name) == name else [_whole(parameter)]

    return _check_same(before, after, others, f"adapter {name} does")


def check_only_experts_changed(before: Path, after: Path, experts: Collection[int]) -> int:
    """The same of some experts, by their number in every layer; each other one counts as a weight.

    Biases of routers that go to zero by a schedule (``model.moe.router_bias_decay_iters``) may have moved.
    """

    def others(parameter: Parameter) -> list[_Region]:
        moe, copies = parameter.model.moe, parameter.copies
        if parameter.roles == ("router_bias",) and moe.router_bias_decay_iters:
            return []
        if copies is None or not copies.routed:
            return [_whole(parameter)]
        offset, shape = _whole(parameter)
        frozen = (number for number in range(copies.number) if number not in experts)
        return [((number, *offset[1:]), (1, *shape[1:])) for number in frozen]

    return _check_same(before, after, others, f"experts {', '.join(map(str, experts))} do")


def _whole(parameter: Parameter) -> _Region:
    """Without rows beyond the vocabulary, which are padding: another layout has another number of them."""
    return (0,) * len(parameter.shape), parameter.shape


def _check_same(before: Path, after: Path, others: Callable[[Parameter], Iterable[_Region]], who: str) -> int:
    folders = resolve_checkpoint(before), resolve_checkpoint(after)
    model, (old, new) = read_model(folders[1]), map(MegatronCheckpointReader, folders)
    same = 0
    for parameter in model_parameters(model):
        for region in others(parameter):
            values = [reader.read_region(parameter.name, *region) for reader in (old, new)]
            if not torch.equal(*values):
                raise CheckpointError(
                    f"{folders[1]} has another {parameter.name} than {folders[0]}, which {who} not own; "
                    "train again from an undamaged checkpoint"
                )
            same += 1
    return same
