"""Linears of the published W8ASpike layout: float weights, and beside them the scales of what they become.

Part of the modelling code of a checkpoint whose config.json has

    "w8aspike": {"quant_method": "w8aspike", "layout": "published", "group_size": 128,
                 "linears": {"q_proj": true, ..., "down_proj": false},     has scales -> is rounded to them
                 "keys_and_values": true}

Tensors: `<linear>.weight`, float; `<linear>.weight_quantizer.scales` [out, in / 128, 1]. A linear multiplies
by round(w / s) * s, whole numbers of any size; the gradient goes straight through. Spikes in front of linears
and of queries are those of the key `spiking`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _WeightQuantizer(nn.Module):
    def __init__(self, rows: int, groups: int) -> None:
        super().__init__()
        self.scales: Tensor
        self.register_buffer("scales", torch.ones(rows, groups, 1))


class LinearWithStoredScales(nn.Module):
    """A linear layer in the place of a float one, whose weight and bias it takes.

    Args:
        linear: that one.
        group_size: weights along the input that share a scale; must divide the inputs.
        is_rounded: whether it multiplies by the rounded weight; else it only holds the scales.

    Raises:
        ValueError: the group size does not divide.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, group_size: int, is_rounded: bool) -> None:
        super().__init__()
        if linear.in_features % group_size:
            raise ValueError(
                f"group_size {group_size} does not divide the {linear.in_features} inputs of a linear."
            )
        self.weight = linear.weight
        bias = getattr(linear, "bias", None)
        if bias is None or isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.register_buffer("bias", bias)  # zeros that are stored for other readers
        self.weight_quantizer = _WeightQuantizer(linear.out_features, linear.in_features // group_size)
        self.is_rounded = is_rounded

    def rounded_weight(self) -> Tensor:
        """[out, in]: what is multiplied by."""
        scales = self.weight_quantizer.scales.float()
        grouped = self.weight.detach().float().unflatten(1, (scales.shape[1], -1))
        rounded = ((grouped / scales).round() * scales).flatten(1).to(self.weight.dtype)
        return self.weight + (rounded - self.weight).detach() if torch.is_grad_enabled() else rounded

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return F.linear(x, self.rounded_weight() if self.is_rounded else self.weight, self.bias)


def add_stored_scales(model: nn.Module, settings: dict) -> None:
    """Put linears with scales in the place of those that `settings` name, before weights are loaded."""
    for module in model.modules():
        if hasattr(module, "int8_keys_and_values"):
            setattr(module, "int8_keys_and_values", bool(settings.get("keys_and_values")))  # noqa: B010
    for name, module in list(model.named_modules()):
        owner, _, last = name.rpartition(".")
        if isinstance(module, nn.Linear) and last in settings["linears"]:
            made = LinearWithStoredScales(module, settings["group_size"], settings["linears"][last])
            setattr(model.get_submodule(owner), last, made)


__all__ = ["LinearWithStoredScales", "add_stored_scales"]
