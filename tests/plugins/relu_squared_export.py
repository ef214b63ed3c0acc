"""The feed-forward "relu_squared" in exports, which carry this file; see relu_squared.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .kinds_spikingbrain import FEED_FORWARDS, FeedForward
from .spikes_gla_swa import encoders_of


class ReluSquaredMLP(nn.Module):
    """Without a gate."""

    def __init__(self, config) -> None:
        super().__init__()
        encoder = encoders_of(config.spiking)
        self.scale = config.kinds["relu_squared"]["scale"]
        self.mlp_fc1_spikes = encoder("mlp_fc1", 0)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.mlp_fc2_spikes = encoder("mlp_fc2", 0)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.scale * torch.relu(self.up_proj(self.mlp_fc1_spikes(x))).square()
        return self.down_proj(self.mlp_fc2_spikes(inside))


FEED_FORWARDS.register(FeedForward("relu_squared", ReluSquaredMLP))
