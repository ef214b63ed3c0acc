"""The activation of gates in feed-forwards of a `spikingbrain` model: one of transformers, or FATReLU.

Part of the modelling code of a checkpoint.
"""

from __future__ import annotations

from torch import nn
from transformers.activations import ACT2FN

from .configuration_spikingbrain import SpikingBrainConfig
from .zeros_sparsellama import FATReLU


def activation_of(config: SpikingBrainConfig) -> nn.Module:
    """What the gates go through."""
    if config.hidden_act_param is not None:  # the configuration has made sure that it is "fatrelu"
        return FATReLU(config.hidden_act_param)
    return ACT2FN[config.hidden_act]


__all__ = ["FATReLU", "activation_of"]
