"""This project's own format, ``spikingbrain``: every form that it trains.

Layers of several mixers, sinks, experts, every gate and feature map of linear attention, spikes. Its
modelling code (``hf/modeling_spikingbrain.py``) travels with every export.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spikingbrain_train.architecture.branches import branch_names, module_name, norm_name
from spikingbrain_train.architecture.kind import OWN_FORMAT, Kind
from spikingbrain_train.architecture.layers import Layer, layers
from spikingbrain_train.architecture.linear_transforms import transforms_of
from spikingbrain_train.architecture.submodule_kind import SubmoduleKind
from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.model import (
    ActivationFunc,
    FeatureMap,
    GatedLinearAttentionConfig,
    GateKind,
    ModelConfig,
    MoEConfig,
    RouterWeights,
)
from spikingbrain_train.conversion.export_code import code_of_export
from spikingbrain_train.conversion.formats.config_keys import OWN_KEYS, ConfigKeys
from spikingbrain_train.conversion.formats.gla_swa import shortest_pattern
from spikingbrain_train.conversion.formats.llama_like import LlamaLikeFormat
from spikingbrain_train.conversion.formats.outside_kinds import (
    kind_keys,
    kinds_of,
    linear_names,
    packed_transforms,
    read_kinds,
)
from spikingbrain_train.conversion.formats.quantization import int8_group, quantization_keys
from spikingbrain_train.conversion.formats.rope import scaling_values
from spikingbrain_train.conversion.formats.spiking import read_spiking
from spikingbrain_train.conversion.formats.training_settings import read_training_settings, training_settings
from spikingbrain_train.conversion.window_convention import WindowConvention
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.hf import SPIKINGBRAIN_CODE

NAMES: Mapping[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "sinks": "model.sink_tokens",
    "final_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
"""Role -> name of what stands around the layers."""
_IN_LAYERS: Mapping[str, str] = {
    "input_norm": "input_layernorm.weight",
    "q_weight": "q_proj.weight",
    "k_weight": "k_proj.weight",
    "v_weight": "v_proj.weight",
    "q_bias": "q_proj.bias",
    "k_bias": "k_proj.bias",
    "v_bias": "v_proj.bias",
    "q_norm": "q_norm.weight",
    "k_norm": "k_norm.weight",
    "attn_sub_norm": "attn_sub_norm.weight",
    "o_weight": "o_proj.weight",
    "o_bias": "o_proj.bias",
    "branch_weights": "branch_weights",
    "mlp_norm": "post_attention_layernorm.weight",
    "mlp_gate_weight": "gate_proj.weight",
    "mlp_up_weight": "up_proj.weight",
    "ffn_sub_norm": "ffn_sub_norm.weight",
    "mlp_down_weight": "down_proj.weight",
    "mlp_gate_bias": "gate_proj.bias",
    "mlp_up_bias": "up_proj.bias",
    "mlp_down_bias": "down_proj.bias",
}
"""Role -> name below what owns it in a layer; kinds name what a dense source does not have."""

_TRAINING = "training"
"""Key in that part of config.json that is for the way back."""


class SpikingBrainFormat(LlamaLikeFormat):
    """Whatever mixers and feed-forwards the layers have, sinks and spikes."""

    architecture = SPIKINGBRAIN_CODE.architectures[0]
    model_type = OWN_FORMAT
    kinds = OWN_FORMAT
    holds = "models of gla, swa and full layers, of experts, branches, sinks and kinds with code of their own"
    names = NAMES
    activations = {func: func.value for func in ActivationFunc}

    def reads(self, values: dict[str, Any]) -> bool:
        return not packed_transforms(values)

    def unsupported(self, model: ModelConfig) -> list[str]:
        """Kinds of layers that are not in its code; all else it holds."""
        kinds: list[SubmoduleKind] = [kind for layer in layers(model) for kind in layer.mixers]
        kinds += [layer.feed_forward for layer in layers(model)]
        parts = [kind.words for kind in dict.fromkeys(kinds) if self.kinds not in kind.hf_layers]
        if model.quantization.stored_scales:
            parts.append("stored scales of INT8 weights")
        quantized = set(model.quantization.projections)
        for kind in transforms_of(model):
            if kind.export_module is not None and quantized.intersection(kind.projections(model)):
                parts.append(f"INT8 weights of projections that {kind.name} is applied to")
        return parts

    def int8_group(self, weight: Weight, model: ModelConfig) -> int | None:
        return int8_group(weight, model)

    def tensor_names(self, weight: Weight, layer: int | None, model: ModelConfig) -> list[str]:
        if layer is None:
            return super().tensor_names(weight, layer, model)
        inside, names = weight.name.removeprefix(f"decoder.layers.{layer}."), []
        owners = self._owners(layers(model)[layer])
        for role in weight.roles:
            if inside in owners:  # the norm of a branch
                names.append(owners[inside][0])
                continue
            owner, kind = next(ours for theirs, ours in owners.items() if inside.startswith(theirs))
            kinds: list[Kind] = [*transforms_of(model), *([] if kind is None else [kind])]
            known = dict(_IN_LAYERS)
            for each in kinds:
                known.update(each.tensor_names)
            if role not in known:
                raise CheckpointError(
                    f"{weight.name} has no name in exports; name its role {role} in tensor_names of the kind "
                    f"that brings it ({', '.join(each.name for each in kinds)})"
                )
            names.append(owner + known[role])
        return [f"model.layers.{layer}.{name}" for name in names]

    def _owners(self, layer: Layer) -> dict[str, tuple[str, Kind | None]]:
        """How names in a Megatron checkpoint begin below their layer, and how here; longest first.

        And the kind whose weights these are; None for the layer's own.
        """
        owners: dict[str, tuple[str, Kind | None]] = {}
        if len(layer.mixers) > 1:
            for kind, branch in zip(layer.mixers, branch_names(layer.mixers), strict=True):
                ours = f"self_attn.{kind.hf_layers[self.kinds]}"
                owners[f"self_attention.{norm_name(branch)}.weight"] = (f"{ours}_norm.weight", None)
                owners[f"self_attention.{module_name(branch)}."] = (f"{ours}.", kind)
        mixer, feed_forward = layer.mixers[0] if len(layer.mixers) == 1 else None, layer.feed_forward
        return {
            **owners,
            "self_attention.": ("self_attn.", mixer),
            "mlp.experts.experts.": ("mlp.experts.{expert}.", feed_forward),
            "mlp.shared_experts.": ("mlp.shared_experts.", feed_forward),
            "mlp.": ("mlp.", feed_forward),
            "": ("", None),
        }

    def read_layers(
        self, keys: ConfigKeys, model: ModelConfig, window_convention: WindowConvention | None
    ) -> None:
        model.add_qkv_bias = keys.boolean("attention_bias", False)
        model.add_output_bias = keys.boolean("output_bias", False)
        model.add_mlp_bias = keys.boolean("mlp_bias", False)
        model.qk_layernorm = keys.boolean("qk_norm", False)
        model.attn_sub_norm = keys.boolean("attn_sub_norm", False)
        model.ffn_sub_norm = keys.boolean("ffn_sub_norm", False)
        model.num_sink_tokens = keys.integer("num_sink_tokens", 0, minimum=0)
        model.sliding_window = keys.integer("sliding_window", 4096)
        mixers = [[self.mixer_of(name) for name in names] for names in _lists(keys, "mixers", model, list)]
        # As configs write them: branches the other way round.
        model.mixers = shortest_pattern([each[0] if len(each) == 1 else each[::-1] for each in mixers])
        model.feed_forwards = shortest_pattern(
            [self.feed_forward_of(name) for name in _lists(keys, "feed_forwards", model, str)]
        )
        model.gla = _read_linear_attention(_section(keys, "linear_attention"))
        model.moe = _read_experts(_section(keys, "moe"))
        model.spiking = read_spiking(keys)
        read_kinds(keys, model, self.tensor_names)
        read_training_settings(_section(_section(keys, OWN_KEYS), _TRAINING), model)

    def keys(self, model: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
        gla, moe = model.gla, model.moe
        rope = scaling_values(model.rope_scaling) or {"rope_type": "default"}
        return {
            **super().keys(model, config),
            "auto_map": dict(SPIKINGBRAIN_CODE.auto_map),
            "rope_parameters": {**rope, "rope_theta": model.rotary_base},
            "attention_bias": model.add_qkv_bias,
            "output_bias": model.add_output_bias,
            "mlp_bias": model.add_mlp_bias,
            "qk_norm": model.qk_layernorm,
            "attn_sub_norm": model.attn_sub_norm,
            "ffn_sub_norm": model.ffn_sub_norm,
            "mixers": [[kind.hf_layers[self.kinds] for kind in layer.mixers] for layer in layers(model)],
            "feed_forwards": [layer.feed_forward.hf_layers[self.kinds] for layer in layers(model)],
            "sliding_window": model.sliding_window,
            "linear_attention": {
                "feature_map": gla.feature_map.value,
                "gate": gla.gate.value,
                "gate_low_rank_dim": gla.gate_low_rank_dim,
                "gate_logit_normalizer": gla.gate_logit_normalizer,
                "qk_norm": gla.qk_norm,
                "num_key_value_heads": gla.num_query_groups,
                "rotary": gla.rotary,
                "output_gate": gla.output_gate,
            },
            "moe": {
                "num_experts": moe.num_experts,
                "num_experts_per_tok": moe.router_topk,
                "norm_topk_prob": moe.norm_topk_prob,
                "router_weights": moe.router_weights.value,
                "router_hidden_size": moe.router_hidden_size,
                "router_bias": moe.router_bias,
                "num_shared_experts": moe.num_shared_experts,
                "moe_intermediate_size": moe.moe_ffn_hidden_size,
            },
            "num_sink_tokens": model.num_sink_tokens,
            **{"spiking": None, **quantization_keys(model, linear_names(model, self.tensor_names))},
            **kind_keys(model, self.tensor_names),
        }

    def keys_for_readers(self, model: ModelConfig, source: dict[str, Any], dtype: str) -> dict[str, Any]:
        """transformers 4.5x reads torch_dtype only, 5 reads both.

        The empty model type keeps AutoTokenizer without remote code from warning, as in the format gla_swa.
        """
        own = {"model_type": "", _TRAINING: training_settings(model)}
        return {OWN_KEYS: own, "dtype": dtype, "torch_dtype": dtype}

    def code_files(self, model: ModelConfig) -> dict[str, str]:
        return code_of_export(SPIKINGBRAIN_CODE, kinds_of(model))

    def notes_on_export(self, model: ModelConfig) -> list[str]:
        return [
            "the folder brings its own modelling code: load it with trust_remote_code=True; no release of "
            "transformers, vLLM or the published SpikingBrain-7B code reads this format"
        ]


def _lists(keys: ConfigKeys, key: str, model: ModelConfig, of: type) -> list[Any]:
    """One entry a layer."""
    value = keys.values.get(key)
    entries = value if isinstance(value, list) else []
    flat = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])]
    if (
        len(entries) != model.num_layers
        or not all(isinstance(entry, of) and entry for entry in entries)
        or not all(isinstance(name, str) for name in flat)
    ):
        noun = "a list of names" if of is list else "a name"
        raise keys.refuse(key, f"must hold {noun} for each of num_hidden_layers = {model.num_layers} layers")
    return entries


def _section(keys: ConfigKeys, key: str) -> ConfigKeys:
    value = keys.values.get(key) or {}
    if not isinstance(value, dict):
        raise keys.refuse(key, "must hold settings by name")
    return ConfigKeys(value, keys.path)


def _read_linear_attention(keys: ConfigKeys) -> GatedLinearAttentionConfig:
    gates, features = [gate.value for gate in GateKind], [feature.value for feature in FeatureMap]
    gate, feature = keys.values.get("gate", gates[0]), keys.values.get("feature_map", features[0])
    if gate not in gates:
        raise keys.refuse("gate", f"must be one of {', '.join(gates)}")
    if feature not in features:
        raise keys.refuse("feature_map", f"must be one of {', '.join(features)}")
    groups = keys.values.get("num_key_value_heads")
    return GatedLinearAttentionConfig(
        feature_map=FeatureMap(feature),
        gate=GateKind(gate),
        gate_low_rank_dim=keys.integer("gate_low_rank_dim", 16),
        gate_logit_normalizer=keys.number("gate_logit_normalizer", 16.0),
        qk_norm=keys.boolean("qk_norm", False),
        num_query_groups=None if groups is None else keys.integer("num_key_value_heads"),
        rotary=keys.boolean("rotary", False),
        output_gate=keys.boolean("output_gate", False),
    )


def _read_experts(keys: ConfigKeys) -> MoEConfig:
    width = keys.values.get("moe_intermediate_size")
    weights, known = keys.values.get("router_weights", "softmax"), [each.value for each in RouterWeights]
    if weights not in known:
        raise keys.refuse("router_weights", f"must be one of {', '.join(known)}")
    hidden = keys.values.get("router_hidden_size")
    return MoEConfig(
        router_hidden_size=None if hidden is None else keys.integer("router_hidden_size"),
        router_bias=keys.boolean("router_bias", False),
        num_experts=keys.integer("num_experts", 16),
        router_topk=keys.integer("num_experts_per_tok", 1),
        norm_topk_prob=keys.boolean("norm_topk_prob", False),
        router_weights=RouterWeights(weights),
        num_shared_experts=keys.integer("num_shared_experts", 1, minimum=0),
        moe_ffn_hidden_size=None if width is None else keys.integer("moe_intermediate_size"),
    )


SPIKINGBRAIN = SpikingBrainFormat()
