"""Initial values of the parameters that a dense source does not have.

The values depend on the seed and the parameter's name alone, so they are the same whatever the number of
layers, the order of conversion or the topology that later loads them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from spikingbrain_train.config.model import GatedLinearAttentionConfig
from spikingbrain_train.conversion.mapping import Parameter


@dataclass(frozen=True)
class Initialisation:
    """A normal distribution where ``std`` is above 0, else values that repeat along the first dimension."""

    values: tuple[float, ...] = (0.0,)
    std: float = 0.0

    def __str__(self) -> str:
        if self.std:
            return f"normal, std {self.std:g}"
        if len(self.values) == 1:
            return f"constant {self.values[0]:g}"
        return f"from {self.values[0]:g} to {self.values[-1]:g} over the channels of each head"


def initialisation(parameter: Parameter) -> Initialisation:
    """How a new parameter starts.

    The gate's bias spreads the channels of a head from fast to slow forgetting, and the small output norm
    keeps the new mixer's contribution low until alignment has trained it.
    """
    gla: GatedLinearAttentionConfig = parameter.model.gla
    return {
        "gate_down_weight": Initialisation(std=gla.init_gate_std),
        "gate_up_weight": Initialisation(std=gla.init_gate_std),
        "gate_up_bias": Initialisation(tuple(gla.init_gate_bias(parameter.model.kv_channels))),
        "out_norm": Initialisation((gla.init_out_norm,)),
    }[parameter.rule.roles[0]]


def new_parameter(parameter: Parameter, seed: int, dtype: torch.dtype) -> Tensor:
    """The values of a new parameter, of its shape and ``dtype``, on CPU."""
    start = initialisation(parameter)
    if start.std > 0:
        digest = hashlib.sha256(f"{seed}/{parameter.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.empty(parameter.shape).normal_(0.0, start.std, generator=generator).to(dtype)
    rows, *columns = parameter.shape
    column = torch.tensor(start.values).repeat(rows // len(start.values))
    return column.view(rows, *[1] * len(columns)).expand(parameter.shape).to(dtype, copy=True)
