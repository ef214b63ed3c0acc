"""Llama, Qwen2 (and Qwen2.5) and Qwen3: dense decoders of transformers, which differ in biases and norms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.linear_transforms import without_transforms
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.conversion.formats.llama_like import LlamaLikeFormat
from spikingbrain_train.conversion.formats.rope import scaling_values
from spikingbrain_train.conversion.window_convention import WindowConvention
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE

NAMES: Mapping[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "input_norm": "model.layers.{layer}.input_layernorm.weight",
    "q_weight": "model.layers.{layer}.self_attn.q_proj.weight",
    "k_weight": "model.layers.{layer}.self_attn.k_proj.weight",
    "v_weight": "model.layers.{layer}.self_attn.v_proj.weight",
    "q_bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{layer}.self_attn.v_proj.bias",
    "q_norm": "model.layers.{layer}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{layer}.self_attn.k_norm.weight",
    "o_weight": "model.layers.{layer}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "mlp_gate_weight": "model.layers.{layer}.mlp.gate_proj.weight",
    "mlp_up_weight": "model.layers.{layer}.mlp.up_proj.weight",
    "mlp_down_weight": "model.layers.{layer}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
"""Role -> name; the families spell them alike."""


class DenseFormat(LlamaLikeFormat):
    """Full attention and a SwiGLU in every layer."""

    kinds = "llama"
    holds = "dense models"
    names = NAMES

    def __init__(
        self,
        architecture: str,
        model_type: str,
        *,
        add_qkv_bias: bool = False,
        qk_layernorm: bool = False,
        head_dim: int | None = None,
        groups_default_to_heads: bool = False,
    ) -> None:
        self.architecture = architecture
        self.model_type = model_type
        self.add_qkv_bias = add_qkv_bias
        self.qk_layernorm = qk_layernorm
        self.head_dim = head_dim
        self.groups_default_to_heads = groups_default_to_heads

    def unsupported(self, model: ModelConfig) -> list[str]:
        parts = super().unsupported(model)
        for name, has, is_there in (
            ("q/k/v biases", self.add_qkv_bias, model.add_qkv_bias),
            ("q/k norms", self.qk_layernorm, model.qk_layernorm),
        ):
            if is_there != has:
                parts.append(name if is_there else f"attention without {name}")
        return parts

    def refuse(self, keys: ConfigKeys) -> None:
        super().refuse(keys)
        for key, reason in (
            ("attention_bias", "puts a bias on the output projection"),
            ("mlp_bias", "puts biases on the FFN"),
        ):
            if keys.boolean(key, False):
                raise keys.refuse(
                    key, f"{reason}, which this model does not have; such checkpoints cannot be imported"
                )

    def read_layers(
        self, keys: ConfigKeys, model: ModelConfig, window_convention: WindowConvention | None
    ) -> None:
        model.mixers = [self.mixer_of("attention")]
        model.feed_forwards = [self.feed_forward_of("mlp")]
        model.add_qkv_bias, model.qk_layernorm = self.add_qkv_bias, self.qk_layernorm
        _refuse_windows(keys, model.num_layers)

    def describes(self, source: dict[str, Any], model: ModelConfig) -> bool:
        described = self.read(ConfigKeys(source, Path(CONFIG_FILE)))
        return described == without_transforms(model)

    def keys(self, model: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
        keys, scaling = super().keys(model, config), scaling_values(model.rope_scaling)
        if "rope_parameters" not in config:
            return keys | {"rope_theta": model.rotary_base, "rope_scaling": scaling}
        rope = {"rope_type": "default", **(scaling or {}), "rope_theta": model.rotary_base}
        theta = {"rope_theta": model.rotary_base} if "rope_theta" in config else {}
        return keys | {"rope_parameters": rope} | theta

    def keys_for_readers(self, model: ModelConfig, source: dict[str, Any], dtype: str) -> dict[str, Any]:
        return {"torch_dtype" if "torch_dtype" in source and "dtype" not in source else "dtype": dtype}


def _refuse_windows(keys: ConfigKeys, num_layers: int) -> None:
    """A dense source attends to everything: Qwen's sliding windows are refused where they take effect.

    That is as transformers' Qwen2Config has it: ``layer_types`` decides if it is there, else layers from
    ``max_window_layers`` on have the window, unless ``sliding_window`` is null.
    """
    layer_types = keys.values.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise keys.refuse("layer_types", "must list the kind of attention of each layer")
    if any(kind != "full_attention" for kind in layer_types):
        raise keys.refuse(
            "layer_types", "has layers other than full_attention, which a dense source must not have"
        )
    has_window = keys.values.get("sliding_window", 4096) is not None
    windowed = keys.boolean("use_sliding_window", False) and has_window and not layer_types
    if windowed and keys.integer("max_window_layers", 28, minimum=0) < num_layers:
        raise keys.refuse(
            "use_sliding_window", "gives some layers a window; a dense source must attend to everything"
        )


LLAMA = DenseFormat("LlamaForCausalLM", "llama", groups_default_to_heads=True)
QWEN2 = DenseFormat("Qwen2ForCausalLM", "qwen2", add_qkv_bias=True)
QWEN3 = DenseFormat("Qwen3ForCausalLM", "qwen3", qk_layernorm=True, head_dim=128)
