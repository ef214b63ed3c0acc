"""Qwen3-MoE: Qwen3's attention, and experts in the place of most feed-forwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.model import ModelConfig, MoEConfig, RouterWeights
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.conversion.formats.dense import NAMES, DenseFormat
from spikingbrain_train.conversion.formats.gla_swa import shortest_pattern
from spikingbrain_train.conversion.window_convention import WindowConvention

_EXPERTS: Mapping[str, str] = {
    "mlp_gate_weight": "model.layers.{layer}.mlp.experts.{{expert}}.gate_proj.weight",
    "mlp_up_weight": "model.layers.{layer}.mlp.experts.{{expert}}.up_proj.weight",
    "mlp_down_weight": "model.layers.{layer}.mlp.experts.{{expert}}.down_proj.weight",
}
"""Role -> name of one expert's tensor."""
_MLP, _MOE = "mlp", "moe"


class Qwen3MoeFormat(DenseFormat):
    """Full attention with q/k norms; a SwiGLU or routed experts in every layer, none shared."""

    kinds = "qwen3_moe"
    holds = "models of Qwen3-MoE's form"
    names = {**NAMES, "router": "model.layers.{layer}.mlp.gate.weight"}

    def __init__(self) -> None:
        super().__init__(
            *("Qwen3MoeForCausalLM", "qwen3_moe"), qk_layernorm=True, head_dim=None, attention_bias=True
        )

    def unsupported(self, model: ModelConfig) -> list[str]:
        parts = super().unsupported(model)
        if not parts and _MOE not in self._feed_forwards(model):
            parts.append("layers without experts alone")
        if not parts and model.moe.num_shared_experts:
            parts.append("shared experts")
        if not parts and model.moe.router_weights is not RouterWeights.softmax:
            parts.append("experts that are not weighted by their probabilities")
        if not parts and model.moe.router_hidden_size is not None:
            parts.append("routers with a hidden layer")
        if not parts and model.moe.router_bias:
            parts.append("routers with biases")
        return parts

    def _feed_forwards(self, model: ModelConfig) -> list[str]:
        return [layer.feed_forward.hf_layers[self.kinds] for layer in layers(model)]

    def tensor_names(self, weight: Weight, layer: int | None, model: ModelConfig) -> list[str]:
        if weight.copies is not None and weight.copies.routed:
            return [_EXPERTS[role].format(layer=layer) for role in weight.roles]
        return super().tensor_names(weight, layer, model)

    def read_layers(
        self, keys: ConfigKeys, model: ModelConfig, window_convention: WindowConvention | None
    ) -> None:
        if keys.boolean("use_sliding_window", False) and keys.values.get("sliding_window", 4096) is not None:
            raise keys.refuse(
                "use_sliding_window", "gives layers windows, in which releases of transformers disagree"
            )
        super().read_layers(keys, model, window_convention)
        number = "num_experts" if keys.values.get("num_experts") is not None else "num_local_experts"
        model.moe = MoEConfig(
            num_experts=keys.integer(number),
            router_topk=keys.integer("num_experts_per_tok"),
            num_shared_experts=0,
            moe_ffn_hidden_size=keys.integer("moe_intermediate_size"),
            norm_topk_prob=keys.boolean("norm_topk_prob", False),
        )
        plain = keys.layers("mlp_only_layers", [], model.num_layers)
        step = keys.integer("decoder_sparse_step", 1)
        kinds = [_MLP if layer in plain or (layer + 1) % step else _MOE for layer in range(model.num_layers)]
        model.feed_forwards = shortest_pattern([self.feed_forward_of(kind) for kind in kinds])

    def keys(self, model: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
        kinds = self._feed_forwards(model)
        return {
            **super().keys(model, config),
            "num_experts": model.moe.num_experts,
            "num_experts_per_tok": model.moe.router_topk,
            "moe_intermediate_size": model.moe.moe_ffn_hidden_size or model.ffn_hidden_size,
            "norm_topk_prob": model.moe.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer, kind in enumerate(kinds) if kind == _MLP],
        }


QWEN3_MOE = Qwen3MoeFormat()
