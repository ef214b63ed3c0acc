"""Weights that no trained model has: NaN, infinity, or nothing but zeros."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from spikingbrain_train.config.errors import CheckpointError

ALLOW_DAMAGED_WEIGHTS = "--allow-damaged-weights"
_MANY_LAYERS = 1000
_LAYER = re.compile(r"\blayers\.(\d+)\.")


def fault_of(tensor: Tensor, *, may_be_zero: bool) -> str | None:
    """What is wrong with the numbers in ``tensor``, in words; None where nothing is.

    One pass over its memory and no copy: minimum and maximum are NaN where any number is.

    Args:
        tensor: floating-point, on CPU.
        may_be_zero: whether every number may be zero, as in a bias.
    """
    if tensor.numel() == 0:
        return None
    low, high = (bound.item() for bound in torch.aminmax(tensor))
    if math.isnan(low):
        return f"holds NaN (first at {_first(tensor.isnan())})"
    if math.isinf(low) or math.isinf(high):
        return f"holds an infinity (first at {_first(tensor.isinf())})"
    if low == high == 0 and not may_be_zero:
        return "holds nothing but zeros"
    return None


def _first(found: Tensor) -> list[int]:
    """Index of the first true element."""
    flat = int(found.flatten().to(torch.uint8).argmax())
    index = []
    for size in reversed(found.shape):
        flat, place = divmod(flat, size)
        index.append(place)
    return index[::-1]


def describe_damage(damaged: dict[str, str]) -> list[str]:
    """A note on tensors that were let through, for the report: name -> what it holds."""
    if not damaged:
        return []
    name, fault = next(iter(damaged.items()))
    more = f", and {len(damaged) - 1} more tensors are damaged" if len(damaged) > 1 else ""
    return [f"{name} {fault}{more}; copied as they are ({ALLOW_DAMAGED_WEIGHTS})"]


def check_number_of_layers(setting: str, number: object, tensors: Callable[[], Iterable[str]]) -> None:
    """Hold a claimed number of layers against stored tensors, before anything is listed for each.

    Small numbers pass: the tensor that is missing then says more.

    Args:
        setting: what claims it, for the message (``config.json: num_hidden_layers``).
        number: the claim; anything but a whole number passes, too.
        tensors: gives names such as ``model.layers.3.mlp.up_proj.weight``; asked for large numbers only.

    Raises:
        CheckpointError: there are tensors of fewer layers.
    """
    if not isinstance(number, int) or number <= _MANY_LAYERS:
        return
    stored = 1 + max((int(match[1]) for match in map(_LAYER.search, tensors()) if match), default=-1)
    if number > stored:
        raise CheckpointError(
            f"{setting} = {number}, but the tensors are of {stored} layers; take both from the same model"
        )
