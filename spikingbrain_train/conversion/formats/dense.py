"""Llama, Mistral, Qwen2 (and Qwen2.5) and Qwen3: dense decoders of transformers.

They differ in biases, norms and windows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.linear_transforms import without_transforms
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.conversion.formats.gla_swa import shortest_pattern
from spikingbrain_train.conversion.formats.llama_like import LlamaLikeFormat
from spikingbrain_train.conversion.formats.rope import ORIGINAL, scaling_values
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
    "attn_sub_norm": "model.layers.{layer}.self_attn.attn_sub_norm.weight",
    "o_weight": "model.layers.{layer}.self_attn.o_proj.weight",
    "o_bias": "model.layers.{layer}.self_attn.o_proj.bias",
    "mlp_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "mlp_gate_weight": "model.layers.{layer}.mlp.gate_proj.weight",
    "mlp_up_weight": "model.layers.{layer}.mlp.up_proj.weight",
    "ffn_sub_norm": "model.layers.{layer}.mlp.ffn_sub_norm.weight",
    "mlp_down_weight": "model.layers.{layer}.mlp.down_proj.weight",
    "mlp_gate_bias": "model.layers.{layer}.mlp.gate_proj.bias",
    "mlp_up_bias": "model.layers.{layer}.mlp.up_proj.bias",
    "mlp_down_bias": "model.layers.{layer}.mlp.down_proj.bias",
    "final_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
"""Role -> name; the families spell them alike."""


_FULL, _WINDOW = "attention", "sliding_attention"
"""What kinds of mixers are called in these formats."""
_LAYER_TYPES = {"full_attention": _FULL, "sliding_attention": _WINDOW}
"""What ``layer_types`` of a config.json calls them."""


_DEFAULT_WINDOW, _DEFAULT_FIRST = 4096, 28
"""``sliding_window`` and ``max_window_layers`` where config.json names none, in all classes alike."""


class Windows(Enum):
    """Which layers of a family can attend within a sliding window."""

    nowhere = "nowhere"
    everywhere = "everywhere"
    """All or none: ``sliding_window`` alone decides."""
    by_layer = "by layer"
    """``layer_types``, or those from ``max_window_layers`` on."""


class DenseFormat(LlamaLikeFormat):
    """Softmax attention and a SwiGLU in every layer."""

    kinds = "llama"
    holds = "dense models"
    names = NAMES
    unread: Collection[str] = ("quantization_config",)

    def __init__(
        self,
        architecture: str,
        model_type: str,
        *,
        add_qkv_bias: bool = False,
        qk_layernorm: bool = False,
        head_dim: int | None = None,
        groups_default_to_heads: bool = False,
        windows: Windows = Windows.nowhere,
        attention_bias: bool = False,
        mlp_bias: bool = False,
        sub_norms: bool = False,
    ) -> None:
        self.architecture = architecture
        self.model_type = model_type
        self.add_qkv_bias = add_qkv_bias
        self.qk_layernorm = qk_layernorm
        self.head_dim = head_dim
        self.groups_default_to_heads = groups_default_to_heads
        self.windows = windows
        self.attention_bias = attention_bias
        """Whether its ``attention_bias`` gives q, k, v and output projections biases."""
        self.mlp_bias = mlp_bias
        """Whether its ``mlp_bias`` gives feed-forwards biases."""
        self.sub_norms = sub_norms
        """Whether norms stand in front of output and down projections."""

    def unsupported(self, model: ModelConfig) -> list[str]:
        parts = super().unsupported(model)
        qkv_bias = model.add_output_bias if self.attention_bias else self.add_qkv_bias
        for name, has, is_there in (
            ("q/k/v biases", qkv_bias, model.add_qkv_bias),
            ("q/k norms", self.qk_layernorm, model.qk_layernorm),
        ):
            if is_there != has:
                parts.append(name if is_there else f"attention without {name}")
        if model.add_output_bias and not self.attention_bias:
            parts.append("biases of output projections")
        if model.add_mlp_bias and not self.mlp_bias:
            parts.append("biases of feed-forwards")
        for name, is_there in (
            ("norms in front of output projections", model.attn_sub_norm),
            ("norms in front of down projections", model.ffn_sub_norm),
        ):
            if is_there != self.sub_norms:
                parts.append(name if is_there else f"layers without {name}")
        kinds = {} if parts else dict.fromkeys(self.layer_types(model))
        if self.windows is Windows.nowhere and _WINDOW in kinds:
            parts.append("sliding-window layers")
        if self.windows is Windows.everywhere and len(kinds) > 1:
            parts.append("sliding windows in some layers only")
        return parts

    def refuse(self, keys: ConfigKeys) -> None:
        super().refuse(keys)
        for key, has in (("attention_bias", self.attention_bias), ("mlp_bias", self.mlp_bias)):
            if keys.boolean(key, False) and not has:
                raise keys.refuse(key, f"is not read by {self.architecture}; remove the key")

    def read_layers(
        self, keys: ConfigKeys, model: ModelConfig, window_convention: WindowConvention | None
    ) -> None:
        layer_types = self._read_layer_types(keys, model.num_layers)
        if _WINDOW in layer_types:
            model.sliding_window = keys.integer("sliding_window", _DEFAULT_WINDOW)
        model.mixers = shortest_pattern([self.mixer_of(layer_type) for layer_type in layer_types])
        model.feed_forwards = [self.feed_forward_of("mlp")]
        model.add_qkv_bias, model.qk_layernorm = self.add_qkv_bias, self.qk_layernorm
        if keys.boolean("attention_bias", False):
            model.add_qkv_bias = model.add_output_bias = True
        model.add_mlp_bias = keys.boolean("mlp_bias", False)
        model.attn_sub_norm = model.ffn_sub_norm = self.sub_norms

    def _read_layer_types(self, keys: ConfigKeys, num_layers: int) -> list[str]:
        """The kind of mixer of every layer, as the class in transformers decides. Raises CheckpointError."""
        values = keys.values
        has_window = values.get("sliding_window", _DEFAULT_WINDOW) is not None
        listed = values.get("layer_types")
        if self.windows is Windows.everywhere:
            found = [_WINDOW if has_window else _FULL] * num_layers
            if listed is not None and [_LAYER_TYPES.get(str(name)) for name in listed] != found:
                raise keys.refuse("layer_types", f"is not read by {self.architecture}; remove the key")
            return found
        uses = keys.boolean("use_sliding_window", False) and has_window
        first = keys.integer("max_window_layers", _DEFAULT_FIRST, minimum=0)
        if listed:
            if (
                not isinstance(listed, list)
                or len(listed) != num_layers
                or not all(isinstance(name, str) and name in _LAYER_TYPES for name in listed)
            ):
                raise keys.refuse(
                    "layer_types", f"must list full_attention or sliding_attention for {num_layers} layers"
                )
            found = [_LAYER_TYPES[name] for name in listed]
            if _WINDOW in found and not uses:
                raise keys.refuse(
                    "layer_types", "has sliding_attention without use_sliding_window = true and a window"
                )
        else:
            found = [_WINDOW if uses and layer >= first else _FULL for layer in range(num_layers)]
        if self.windows is Windows.nowhere and _WINDOW in found:
            key = "layer_types" if listed else "use_sliding_window"
            raise keys.refuse(key, f"gives layers a window, which {self.architecture} does not have")
        return found

    def describes(self, source: dict[str, Any], model: ModelConfig) -> bool:
        described = self.read(ConfigKeys(source, Path(CONFIG_FILE)))
        return described == without_transforms(model)

    def keys(self, model: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
        keys, scaling = super().keys(model, config), scaling_values(model.rope_scaling)
        keys |= self._window_keys(model, config)
        keys |= {"attention_bias": model.add_output_bias} if self.attention_bias else {}
        keys |= {"mlp_bias": model.add_mlp_bias} if self.mlp_bias else {}
        if ORIGINAL in config and ORIGINAL in (scaling or {}):
            keys[ORIGINAL] = model.rope_scaling.original_max_position_embeddings  # it has the last word
        if "rope_parameters" not in config:
            return keys | {"rope_theta": model.rotary_base, "rope_scaling": scaling}
        rope = {"rope_type": "default", **(scaling or {}), "rope_theta": model.rotary_base}
        theta = {"rope_theta": model.rotary_base} if "rope_theta" in config else {}
        return keys | {"rope_parameters": rope} | theta

    def _window_keys(self, model: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
        kinds = self.layer_types(model)
        window = model.sliding_window if _WINDOW in kinds else None
        if self.windows is Windows.everywhere:
            return {"sliding_window": window}
        said = self._read_layer_types(ConfigKeys(config, Path(CONFIG_FILE)), model.num_layers)
        if window is None and said == kinds:
            return {}
        names = {kind: name for name, kind in _LAYER_TYPES.items()}
        first = kinds.index(_WINDOW) if window is not None else len(kinds)
        return {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": first,  # what releases before layer_types read
            "layer_types": [names[kind] for kind in kinds],
        }

    def keys_for_readers(self, model: ModelConfig, source: dict[str, Any], dtype: str) -> dict[str, Any]:
        return {"torch_dtype" if "torch_dtype" in source and "dtype" not in source else "dtype": dtype}


LLAMA = DenseFormat(
    *("LlamaForCausalLM", "llama"), groups_default_to_heads=True, attention_bias=True, mlp_bias=True
)
MISTRAL = DenseFormat("MistralForCausalLM", "mistral", windows=Windows.everywhere)
QWEN2 = DenseFormat("Qwen2ForCausalLM", "qwen2", add_qkv_bias=True, windows=Windows.by_layer)
QWEN3 = DenseFormat(
    *("Qwen3ForCausalLM", "qwen3"),
    qk_layernorm=True,
    head_dim=128,
    windows=Windows.by_layer,
    attention_bias=True,
)
