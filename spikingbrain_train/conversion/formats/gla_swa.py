"""The published SpikingBrain-7B format: gated linear, sliding-window and full attention, dense feed-forwards.

The published classes always have q/k/v biases, and the vLLM plugin also wants lm_head.weight of tied models.
An export carries both: a class that draws the biases it does not find computes something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.gated_linear_attention import has_own_qk_norm, query_groups
from spikingbrain_train.architecture.layers import mixers_of, model_weights
from spikingbrain_train.architecture.linear_transforms import transforms_of
from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.model import (
    ActivationFunc,
    FeatureMap,
    GatedLinearAttentionConfig,
    GateKind,
    ModelConfig,
)
from spikingbrain_train.conversion.export_code import code_of_export
from spikingbrain_train.conversion.formats.config_keys import OWN_KEYS, ConfigKeys
from spikingbrain_train.conversion.formats.hf_format import Completion, Zeros
from spikingbrain_train.conversion.formats.llama_like import LlamaLikeFormat
from spikingbrain_train.conversion.formats.quantization import int8_group, quantization_keys
from spikingbrain_train.conversion.formats.rope import scaling_values, words_of
from spikingbrain_train.conversion.formats.spiking import read_spiking
from spikingbrain_train.conversion.window_convention import (
    WINDOW_KEY,
    WindowConvention,
    default_convention,
    says_its_window,
)
from spikingbrain_train.hf import DEFAULT_ROPE_THETA, GLA_SWA_CODE

NAMES: Mapping[str, str] = {
    "embedding": "model.embeddings.weight",
    "input_norm": "model.layers.{layer}.attn_norm.weight",
    "q_weight": "model.layers.{layer}.attn.q_proj.weight",
    "k_weight": "model.layers.{layer}.attn.k_proj.weight",
    "v_weight": "model.layers.{layer}.attn.v_proj.weight",
    "q_bias": "model.layers.{layer}.attn.q_proj.bias",
    "k_bias": "model.layers.{layer}.attn.k_proj.bias",
    "v_bias": "model.layers.{layer}.attn.v_proj.bias",
    "q_norm": "model.layers.{layer}.attn.q_norm.weight",
    "k_norm": "model.layers.{layer}.attn.k_norm.weight",
    "o_weight": "model.layers.{layer}.attn.o_proj.weight",
    "gate_down_weight": "model.layers.{layer}.attn.gk_proj.0.weight",
    "gate_up_weight": "model.layers.{layer}.attn.gk_proj.1.weight",
    "gate_up_bias": "model.layers.{layer}.attn.gk_proj.1.bias",
    "gate_weight": "model.layers.{layer}.attn.gk_proj.weight",
    "gate_bias": "model.layers.{layer}.attn.gk_proj.bias",
    "log_decay": "model.layers.{layer}.attn.log_decay",
    "output_gate_weight": "model.layers.{layer}.attn.g_proj.weight",
    "output_gate_bias": "model.layers.{layer}.attn.g_proj.bias",
    "out_norm": "model.layers.{layer}.attn.g_norm.weight",
    "mlp_norm": "model.layers.{layer}.mlp_norm.weight",
    "mlp_gate_weight": "model.layers.{layer}.mlp.gate_proj.weight",
    "mlp_up_weight": "model.layers.{layer}.mlp.up_proj.weight",
    "mlp_down_weight": "model.layers.{layer}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
"""Role -> name in the published checkpoint, and of what it does not have, such as norms of q and k."""

_LINEAR, _WINDOW, _FULL = "linear_attention", "sliding_attention", "full_attention"
_KERNEL_CHOICES = {"attn_mode": "chunk", "conv_size": 4, "fuse_cross_entropy": True}
"""Keys of the published class that change no result; a source's own are kept."""
_GATE_RANK = 16
_GATE_NORMALIZER = 16.0


class GatedLinearSlidingWindowFormat(LlamaLikeFormat):
    """``gla_swa``: the published classes, and what this project's own modelling code holds beyond them."""

    architecture = GLA_SWA_CODE.architectures[0]
    model_type = "gla_swa"
    kinds = "gla_swa"
    holds = (
        "the SpikingBrain-7B form (gla, swa and full layers, dense feed-forwards, low-rank gate, ReLU "
        "features)"
    )
    names = NAMES
    rope_theta = DEFAULT_ROPE_THETA
    norm_key = "norm_eps"
    activations = {ActivationFunc.silu: "swish"}

    def unsupported(self, model: ModelConfig) -> list[str]:
        parts = super().unsupported(model)
        if model.add_output_bias:
            parts.append("biases of output projections")
        if model.add_mlp_bias:
            parts.append("biases of feed-forwards")
        if model.attn_sub_norm or model.ffn_sub_norm:
            parts.append("sub-norms")
        if model.quantization.stored_scales:
            parts.append("stored scales of INT8 weights")
        if self._has_linear_layers(model):
            if model.gla.gate is GateKind.tied:
                parts.append(f"gla.gate={model.gla.gate.value}")
            if model.gla.feature_map is not FeatureMap.relu:
                parts.append(f"gla.feature_map={model.gla.feature_map.value}")
        return parts

    def int8_group(self, weight: Weight, model: ModelConfig) -> int | None:
        return int8_group(weight, model)

    def _has_linear_layers(self, model: ModelConfig) -> bool:
        return any(kind.hf_layers.get(self.kinds) == _LINEAR for kind in mixers_of(model))

    def read_layers(
        self, keys: ConfigKeys, model: ModelConfig, window_convention: WindowConvention | None
    ) -> None:
        if keys.boolean("use_short_conv", False):
            raise keys.refuse("use_short_conv", "is not supported; GLA layers have no short convolution")
        if not keys.boolean("elementwise_affine", True):
            raise keys.refuse("elementwise_affine", "is not supported; the output norm has a weight")
        model.add_qkv_bias = keys.boolean("attention_bias", True)
        model.qk_layernorm = keys.boolean("qk_norm", False)
        model.gla = GatedLinearAttentionConfig(
            gate_low_rank_dim=keys.integer("gate_low_rank_dim", 16),
            gate_logit_normalizer=keys.number("gate_logit_normalizer", 16.0),
            qk_norm=keys.boolean("linear_qk_norm", False),
            rotary=keys.boolean("linear_rotary", False),
            output_gate=keys.boolean("linear_output_gate", False),
        )
        if keys.values.get("linear_gate", "low_rank") not in ("low_rank", "full_rank", "fixed"):
            raise keys.refuse("linear_gate", 'is not supported; it is "low_rank", "full_rank" or "fixed"')
        model.gla.gate = GateKind(keys.values.get("linear_gate", "low_rank"))
        groups = keys.integer("linear_num_key_value_heads", model.num_query_groups)
        if model.num_attention_heads % groups or groups % model.num_query_groups:
            raise keys.refuse(
                "linear_num_key_value_heads",
                f"must divide num_attention_heads = {model.num_attention_heads} and be a multiple of "
                f"num_key_value_heads = {model.num_query_groups}",
            )
        if groups != model.num_query_groups:
            model.gla.num_query_groups = groups
        softmax_layers = keys.layers("attn_layers", list(range(1, model.num_layers, 2)), model.num_layers)
        full_layers = keys.layers("full_attention_layers", [], model.num_layers)
        if not set(full_layers) <= set(softmax_layers):
            raise keys.refuse("full_attention_layers", "must also be listed in attn_layers")
        if keys.values.get(WINDOW_KEY) is not None:
            model.sliding_window = keys.integer(WINDOW_KEY)
            if keys.values.get("sliding_window", model.sliding_window - 1) != model.sliding_window - 1:
                raise keys.refuse(
                    "sliding_window", f"contradicts {WINDOW_KEY} = {model.sliding_window}, which is one more"
                )
        elif "sliding_window" in keys.values and keys.values["sliding_window"] is None:
            full_layers = softmax_layers
        else:
            convention = window_convention or default_convention(keys.values)
            model.sliding_window = convention.window(keys.integer("sliding_window", 4096))
        mixer = {layer_type: self.mixer_of(layer_type) for layer_type in (_LINEAR, _WINDOW, _FULL)}
        softmax, full = set(softmax_layers), set(full_layers)
        model.mixers = shortest_pattern(
            [
                mixer[_LINEAR if layer not in softmax else _FULL if layer in full else _WINDOW]
                for layer in range(model.num_layers)
            ]
        )
        model.feed_forwards = [self.feed_forward_of("mlp")]
        model.spiking = read_spiking(keys)

    def notes_on_import(
        self, folder: Path, config: dict[str, Any], model: ModelConfig, chosen: WindowConvention | None
    ) -> list[str]:
        if says_its_window(config) or _WINDOW not in self.layer_types(model):
            return super().notes_on_import(folder, config, model, chosen)
        convention = chosen or default_convention(config)
        other = next(one for one in WindowConvention if one is not convention)
        is_default = convention is WindowConvention.published
        reader = "its default code does" if is_default else "its SDPA variant does"
        return [
            f"sliding_window is read as {reader}: a token sees {model.sliding_window} tokens, itself "
            f"included (--window-convention {convention.value}; --window-convention {other.value} is the "
            f"other reading)"
        ]

    def keys(self, model: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
        """``sliding_window`` is what makes the published default code see as many tokens as ``model``."""
        layer_types, scaling = self.layer_types(model), scaling_values(model.rope_scaling)
        # Not rope_scaling: transformers 5 fails on it where it reads the file as a plain PretrainedConfig.
        rope = {**scaling, "rope_theta": model.rotary_base} if scaling else None
        return {
            **super().keys(model, config),
            "rope_theta": model.rotary_base,
            "rope_parameters": rope,
            **{key: config.get(key, value) for key, value in _KERNEL_CHOICES.items()},
            "auto_map": dict(GLA_SWA_CODE.auto_map),
            "attn_layers": _where(layer_types, _WINDOW, _FULL),
            "full_attention_layers": _where(layer_types, _FULL),
            "sliding_window": model.sliding_window - 1,
            "attention_bias": model.add_qkv_bias,
            "qk_norm": model.qk_layernorm,
            "gate_low_rank_dim": model.gla.gate_low_rank_dim,
            "gate_logit_normalizer": model.gla.gate_logit_normalizer,
            "use_short_conv": False,
            "elementwise_affine": True,
            **self._options(model),
            **quantization_keys(model),
        }

    def _options(self, model: ModelConfig) -> dict[str, Any]:
        """Keys of options of linear layers that the published form does not have, where they are used."""
        if not self._has_linear_layers(model):
            return {}
        groups = query_groups(model)
        options = {
            "linear_qk_norm": has_own_qk_norm(model),
            "linear_rotary": model.gla.rotary,
            "linear_output_gate": model.gla.output_gate,
            "linear_gate": model.gla.gate.value if model.gla.gate is not GateKind.low_rank else None,
            "linear_num_key_value_heads": groups if groups != model.num_query_groups else None,
        }
        return {key: value for key, value in options.items() if value}

    def config(self, model: ModelConfig, source: dict[str, Any] | None, dtype: str) -> dict[str, Any]:
        config = super().config(model, source, dtype)
        config.pop("rope_scaling", None)  # a source's; rope_parameters instead
        return config

    def keys_for_readers(self, model: ModelConfig, source: dict[str, Any], dtype: str) -> dict[str, Any]:
        """transformers 4.5x reads torch_dtype only, 5 reads both.

        AutoTokenizer without remote code reads a model type that it does not know as a plain
        PretrainedConfig: with a warning, unless a part of the file has the plain configuration's empty model
        type.
        """
        own = {"model_type": "", "beyond_the_published_class": self.published_class_lacks(model)}
        return {WINDOW_KEY: model.sliding_window, OWN_KEYS: own, "dtype": dtype, "torch_dtype": dtype}

    def completions(self, model: ModelConfig) -> Iterator[Completion]:
        """Zero biases of models without, and the output layer of tied ones."""
        for layer, weight in model_weights(model):
            if weight.roles == ("q_weight", "k_weight", "v_weight") and not model.add_qkv_bias:
                for role, shape in zip(("q_bias", "k_bias", "v_bias"), weight.shapes, strict=True):
                    yield Zeros(
                        NAMES[role].format(layer=layer),
                        shape[:1],
                        layer,
                        weight,
                        group=weight.group,
                        origin="zero biases for the published class",
                        what="q/k/v biases",
                        setting="attention_bias",
                    )
            elif weight.roles == ("embedding",) and model.share_embeddings_and_output_weights:
                yield Completion(
                    NAMES["output"],
                    weight.shapes[0],
                    layer,
                    weight,
                    group="output layer",
                    origin="copy of the tied embedding",
                )

    def code_files(self, model: ModelConfig) -> dict[str, str]:
        return code_of_export(GLA_SWA_CODE)

    def notes_on_export(self, model: ModelConfig) -> list[str]:
        lacks = self.published_class_lacks(model)
        if not lacks:
            return []
        return [
            f"the published modelling code has no {' and no '.join(lacks)}; load the folder with the code "
            f"that it carries (trust_remote_code=True)"
        ]

    def _not_published(self, model: ModelConfig) -> str:
        """What is done to projections, queries, keys and values that the published class does not do."""
        asked = [kind.describe(model) for kind in transforms_of(model)]
        asked += ["spiking queries"] if model.spiking.queries else []
        asked += ["INT8 keys and values"] if model.quantization.keys_and_values else []
        return ", ".join(asked)

    def published_class_lacks(self, model: ModelConfig) -> list[str]:
        """What of a model the published code does not compute, in words; empty if it computes all."""
        layer_types = self.layer_types(model)
        softmax_layers, full_layers = _where(layer_types, _WINDOW, _FULL), _where(layer_types, _FULL)
        published_layers = list(range(1, model.num_layers, 2))
        width_of_heads = model.kv_channels * model.num_attention_heads
        rank, normalizer = model.gla.gate_low_rank_dim, model.gla.gate_logit_normalizer
        options = self._options(model)
        transforms = self._not_published(model)
        return [
            words
            for words, is_so in (
                (f"head_dim {model.kv_channels}", width_of_heads != model.hidden_size),
                ("q/k norms", model.qk_layernorm),
                (f"softmax attention in layers {softmax_layers}", softmax_layers != published_layers),
                (f"full attention in layers {full_layers}", bool(full_layers)),
                (words_of(model.rope_scaling), scaling_values(model.rope_scaling) is not None),
                (f"gate of rank {rank}", rank != _GATE_RANK),
                (f"gate normalizer of {normalizer:g}", normalizer != _GATE_NORMALIZER),
                ("q/k norms in linear layers alone", "linear_qk_norm" in options),
                ("rotary positions in linear layers", "linear_rotary" in options),
                ("output gate", "linear_output_gate" in options),
                ("full-rank gate", options.get("linear_gate") == "full_rank"),
                ("fixed decay", options.get("linear_gate") == "fixed"),
                (
                    f"{query_groups(model)} query groups in linear layers alone",
                    "linear_num_key_value_heads" in options,
                ),
                (transforms, bool(transforms)),
            )
            if is_so
        ]


def _where(layer_types: list[str], *chosen: str) -> list[int]:
    return [layer for layer, layer_type in enumerate(layer_types) if layer_type in chosen]


def shortest_pattern(mixers: list[Any]) -> list[Any]:
    """The shortest list that, repeated, spells ``mixers``: 28 alternating layers become [gla, swa]."""
    for length in range(1, len(mixers)):
        if all(mixer == mixers[layer % length] for layer, mixer in enumerate(mixers)):
            return mixers[:length]
    return mixers


GLA_SWA = GatedLinearSlidingWindowFormat()
