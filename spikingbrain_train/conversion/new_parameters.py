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
    """A constant, or a normal distribution around it where ``std`` is above 0."""

    mean: float
    std: float = 0.0

    def __str__(self) -> str:
        return f"normal, std {self.std:g}" if self.std else f"constant {self.mean:g}"


def initialisation(parameter: Parameter) -> Initialisation:
    """How a new parameter starts.

    The gate's bias opens the gate (slow forgetting) and the small output norm keeps the new mixer's
    contribution near zero until alignment has trained it.
    """
    gla: GatedLinearAttentionConfig = parameter.model.gla
    return {
        "gate_down_weight": Initialisation(0.0, gla.init_gate_std),
        "gate_up_weight": Initialisation(0.0, gla.init_gate_std),
        "gate_up_bias": Initialisation(gla.init_gate_bias),
        "out_norm": Initialisation(gla.init_out_norm),
    }[parameter.rule.roles[0]]


def new_parameter(parameter: Parameter, seed: int, dtype: torch.dtype) -> Tensor:
    """The values of a new parameter, of its shape and ``dtype``, on CPU."""
    start = initialisation(parameter)
    tensor = torch.full(parameter.shape, start.mean, dtype=torch.float32)
    if start.std > 0:
        digest = hashlib.sha256(f"{seed}/{parameter.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        tensor.normal_(start.mean, start.std, generator=generator)
    return tensor.to(dtype)
