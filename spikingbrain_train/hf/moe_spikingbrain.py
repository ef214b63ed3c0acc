"""The feed-forward "moe" of a `spikingbrain` model, and its settings under that key of config.json.

Part of the modelling code of a checkpoint. There is no loss that balances experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_spikingbrain import SpikingBrainConfig
from .gated_mlp_spikingbrain import SpikingBrainMLP
from .kinds_spikingbrain import FEED_FORWARDS, FeedForward, with_defaults

_KEY = "moe"
_DEFAULTS: dict[str, Any] = {
    "num_experts": 16,
    "num_experts_per_tok": 1,
    "norm_topk_prob": False,
    "router_weights": "softmax",
    "router_hidden_size": None,
    "router_bias": False,
    "num_shared_experts": 1,
    "moe_intermediate_size": None,
}
"""What settings are where config.json leaves them out."""


def _settings(config: SpikingBrainConfig) -> dict[str, Any]:
    return with_defaults(_KEY, config.moe, _DEFAULTS)


def _check(config: SpikingBrainConfig) -> None:
    settings = _settings(config)
    if settings["num_experts_per_tok"] > settings["num_experts"]:
        raise ValueError(
            f"num_experts_per_tok {settings['num_experts_per_tok']} of {_KEY} is above num_experts "
            f"{settings['num_experts']}."
        )
    if settings["router_weights"] not in ("softmax", "ones"):
        raise ValueError(
            f"router_weights {settings['router_weights']!r} of {_KEY} is neither softmax nor ones."
        )


class SpikingBrainRouter(nn.Module):
    """Chooses the experts of every token, in float32."""

    def __init__(self, hidden_size: int, moe: dict[str, Any]) -> None:
        super().__init__()
        self.norm, self.weights = moe["norm_topk_prob"], moe["router_weights"]
        self.num_chosen = moe["num_experts_per_tok"]
        number, inside = moe["num_experts"], moe["router_hidden_size"]
        self.weight = nn.Parameter(torch.empty(number, inside or hidden_size))
        self.hidden_weight = nn.Parameter(torch.empty(inside, hidden_size)) if inside else None
        self.bias = nn.Parameter(torch.zeros(number), requires_grad=False) if moe["router_bias"] else None

    def initialize(self, std: float) -> None:
        nn.init.normal_(self.weight, mean=0.0, std=std)
        if self.hidden_weight is not None:
            nn.init.normal_(self.hidden_weight, mean=0.0, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [N, k] of the k likeliest experts, and their indices."""
        inside = x_ND.float()
        if self.hidden_weight is not None:
            inside = F.linear(inside, self.hidden_weight.float()).tanh()
        logits_NE = F.linear(inside, self.weight.float())
        if self.bias is not None:
            logits_NE = logits_NE + self.bias.float()
        scores_NE = logits_NE.softmax(-1)
        probs_NK, experts_NK = scores_NE.topk(self.num_chosen, dim=-1)
        if self.weights == "ones":
            # Exactly 1, with the gradient of the probability.
            probs_NK = 1 + (probs_NK - probs_NK.detach())
        return probs_NK / probs_NK.sum(-1, keepdim=True) if self.norm else probs_NK, experts_NK


class SpikingBrainMoE(nn.Module):
    """Experts for some tokens each, and shared ones for all."""

    def __init__(self, config: SpikingBrainConfig) -> None:
        super().__init__()
        moe = _settings(config)
        width = moe["moe_intermediate_size"] or config.intermediate_size

        def expert(width: int) -> SpikingBrainMLP:
            return SpikingBrainMLP(config, width)

        self.router = SpikingBrainRouter(config.hidden_size, moe)
        self.experts = nn.ModuleList(expert(width) for _ in range(moe["num_experts"]))
        shared = moe["num_shared_experts"]
        self.shared_experts = expert(shared * width) if shared else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, -2)
        probs_NK, experts_NK = self.router(x_ND)
        output = torch.zeros_like(x_ND) if self.shared_experts is None else self.shared_experts(x_ND)
        for expert in experts_NK.unique().tolist():
            token, choice = (experts_NK == expert).nonzero(as_tuple=True)
            part = self.experts[expert](x_ND[token], probs_NK[token, choice].unsqueeze(-1))
            output = output.index_add(0, token, part)
        return output.view_as(x_BTD)


FEED_FORWARDS.register(FeedForward(_KEY, SpikingBrainMoE, check=_check))

__all__ = ["SpikingBrainMoE"]
