"""Linears whose input or weight is transformed, as `linear_transforms` of config.json says.

Part of the modelling code of a checkpoint; needs torch only. `linear_transforms` lists, in the order in which
they are applied,

    {"name": "rounding", "linears": {"sliding_attention": [["q_proj", "k_proj", "v_proj"]],
                                     "mlp": [["gate_proj", "up_proj"], ["down_proj"]]}}

with the linears (by their last name, or the last two) that the kind of this name transforms in mixers and
feed-forwards of each kind; those in one list were one matrix while the model was trained. Spikes stand in
front of projections and come before. An entry with "packed": true says that the weights of its linears are
stored as what the kind makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .kinds_spikingbrain import LINEAR_TRANSFORMS


class LinearTransform(nn.Module):
    """What is done to one linear; does nothing. What it stores lies below the linear, under its kind's name.

    Args:
        config: of the model.
        linear: that it is for.
    """

    whole_numbers: str | None = None
    """What counts_w8aspike.py calls the whole numbers times one number a token that its `input` gives; None
    where these are others."""

    def __init__(self, config: Any, linear: nn.Linear) -> None:
        super().__init__()

    def input(self, x: Tensor) -> Tensor:
        """What is multiplied in the place of x [..., in]."""
        return x

    def weight(self, weight: Tensor, whole: Sequence[Tensor]) -> Tensor:
        """What is multiplied by in the place of a weight [out, in].

        Args:
            weight: that, as transforms before this one left it.
            whole: the weights [out, in] that were one matrix in training, in order, as they are stored; the
                linear's own is among them.
        """
        return weight


class TransformedLinear(nn.Linear):
    """A linear in the place of a plain one, whose parameters it takes."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.names: list[str] = []
        # In a list, modules are no submodules: each is stored once, below its own layer.
        self.whole: list[Sequence[nn.Linear]] = []

    def add(self, name: str, transform: nn.Module, whole: Sequence[nn.Linear]) -> None:
        """Apply `transform`, too; `whole` are the linears that were one with this one in training."""
        self.add_module(name, transform)
        self.names.append(name)
        self.whole.append(whole)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        weight = self.weight
        for name, whole in zip(self.names, self.whole, strict=True):
            transform = getattr(self, name)
            x = transform.input(x)
            weight = transform.weight(weight, [linear.weight for linear in whole])
        return F.linear(x, weight, self.bias)


def transform_linears(part: nn.Module, name: str, config: Any) -> None:
    """Put transformed linears in the place of those that `config.linear_transforms` names.

    Args:
        part: a mixer or a feed-forward.
        name: of its kind.
        config: of the model.

    Raises:
        ValueError: a kind that no file here has or that stores no weights packed, or linears of one matrix
            that are not side by side.
    """
    packed: list[tuple[str, Callable[[Any], nn.Module]]] = []
    for entry in config.linear_transforms:
        kind = LINEAR_TRANSFORMS[entry["name"]]
        if entry.get("packed") and kind.pack is None:
            raise ValueError(f"linear_transforms has {kind.name} packed, which stores no weights so.")
        for names in entry["linears"].get(name, ()):
            for prefix in _owners(part, names[0]):
                whole = [_transformed(part, prefix + each) for each in names]
                for linear in whole:
                    linear.add(kind.name, kind.make(config, linear), whole)
                if entry.get("packed") and kind.pack is not None:
                    packed += [(prefix + each, kind.pack) for each in names]
    for linear_name, pack in packed:  # with all that is done to their inputs
        owner, _, last = linear_name.rpartition(".")
        setattr(part.get_submodule(owner), last, pack(part.get_submodule(linear_name)))


def _owners(part: nn.Module, name: str) -> list[str]:
    """What stands before `name` in the names of linears that end in it."""
    return [
        full.removesuffix(name)
        for full, module in part.named_modules()
        if isinstance(module, nn.Linear) and (full == name or full.endswith("." + name))
    ]


def _transformed(part: nn.Module, name: str) -> TransformedLinear:
    """The linear `name`, put in the place of a plain one."""
    owner, _, last = name.rpartition(".")
    try:
        found = part.get_submodule(name)
    except AttributeError:
        found = None
    if isinstance(found, TransformedLinear):
        return found
    if not isinstance(found, nn.Linear):
        raise ValueError(f"linear_transforms names {name} as a part of a matrix, which is no linear here.")
    made = TransformedLinear(found)
    setattr(part.get_submodule(owner), last, made)
    return made


__all__ = ["LinearTransform", "TransformedLinear", "transform_linears"]
