"""The activation of gates in feed-forwards of a `spikingbrain` model: one of transformers, or FATReLU.

Part of the modelling code of a checkpoint.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_spikingbrain import SpikingBrainConfig


class FATReLU(nn.Module):
    """x where it is at least `threshold`, else 0 (ProSparse, arXiv 2402.13516, section 3.2)."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        closed = x <= 0 if self.threshold == 0 else x < self.threshold
        return x.masked_fill(closed, 0)


def activation_of(config: SpikingBrainConfig) -> nn.Module:
    """What the gates go through."""
    if config.hidden_act_param is not None:  # the configuration has made sure that it is "fatrelu"
        return FATReLU(config.hidden_act_param)
    return ACT2FN[config.hidden_act]


__all__ = ["FATReLU", "activation_of"]
