"""Llama with FATReLU in its feed-forwards: x where it is at least a threshold, else 0.

ProSparse (arXiv 2402.13516, section 3.2). Everything else is transformers' Llama; needs transformers >= 4.51.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import LlamaForCausalLM

from .configuration_sparsellama import SparseLlamaConfig


class FATReLU(nn.Module):
    """x where it is at least `threshold`, else 0; ReLU where that is 0."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        closed = x <= 0 if self.threshold == 0 else x < self.threshold
        return x.masked_fill(closed, 0)


class SparseLlamaForCausalLM(LlamaForCausalLM):
    """`hidden_act` is "fatrelu" with `hidden_act_param`, or an activation that transformers has.

    Raises:
        ValueError: "fatrelu" without a threshold of at least 0.
    """

    config_class = SparseLlamaConfig

    def __init__(self, config: SparseLlamaConfig) -> None:
        activation = config.hidden_act
        if activation != "fatrelu":
            super().__init__(config)
            return
        threshold = getattr(config, "hidden_act_param", None)
        if not isinstance(threshold, (int, float)) or not threshold >= 0:
            raise ValueError(f'hidden_act "fatrelu" needs a hidden_act_param of at least 0, got {threshold}.')
        config.hidden_act = "relu"  # Llama's layers look it up among transformers' own
        try:
            super().__init__(config)
        finally:
            config.hidden_act = activation
        for layer in self.model.layers:
            layer.mlp.act_fn = FATReLU(threshold)


SparseLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["SparseLlamaForCausalLM"]
