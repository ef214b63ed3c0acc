"""Llama with FATReLU or ReLU in its feed-forwards: x where it is at least a threshold, else 0.

ProSparse (arXiv 2402.13516, section 3.2). Everything else is transformers' Llama; needs transformers >= 4.51.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

In float32 on a CPU it generates without reading the weights that meet zeros (zeros_sparsellama.py), but for
`"skip_zeros": false` in config.json.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LlamaForCausalLM

from .configuration_sparsellama import SparseLlamaConfig
from .zeros_sparsellama import FATReLU, sparse_mlp


class SparseLlamaMLP(nn.Module):
    """Llama's feed-forward, whose projections it takes over, with an activation that has zeros."""

    def __init__(self, mlp: Any, activation: nn.Module, skip_zeros: bool) -> None:
        super().__init__()
        self.gate_proj: nn.Linear = mlp.gate_proj
        self.up_proj: nn.Linear = mlp.up_proj
        self.down_proj: nn.Linear = mlp.down_proj
        self.act_fn = activation
        self.skip_zeros = skip_zeros

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to the same."""
        if self.skip_zeros:
            y = sparse_mlp(x, self.gate_proj, self.up_proj, self.down_proj, self.act_fn)
            if y is not None:
                return y
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class SparseLlamaForCausalLM(LlamaForCausalLM):
    """`hidden_act` is "fatrelu" with `hidden_act_param`, or an activation that transformers has.

    Raises:
        ValueError: "fatrelu" without a threshold of at least 0.
    """

    config_class = SparseLlamaConfig

    def __init__(self, config: SparseLlamaConfig) -> None:
        activation = config.hidden_act
        if activation not in ("fatrelu", "relu"):
            super().__init__(config)
            return
        threshold: Any = getattr(config, "hidden_act_param", None)
        if activation == "fatrelu" and (not isinstance(threshold, (int, float)) or not threshold >= 0):
            raise ValueError(f'hidden_act "fatrelu" needs a hidden_act_param of at least 0, got {threshold}.')
        config.hidden_act = "relu"  # Llama's layers look it up among transformers' own
        try:
            super().__init__(config)
        finally:
            config.hidden_act = activation
        for layer in self.model.layers:
            act_fn = FATReLU(threshold) if activation == "fatrelu" else layer.mlp.act_fn
            layer.mlp = SparseLlamaMLP(layer.mlp, act_fn, config.skip_zeros)


SparseLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["SparseLlamaForCausalLM"]
