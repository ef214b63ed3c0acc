"""Models to the config.json of the Hugging Face architecture that computes the same, where there is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from spikingbrain_train.config.kinds import of_kind
from spikingbrain_train.config.model import FeatureMap, FeedForward, GateKind, Mixer, ModelConfig
from spikingbrain_train.conversion.code_references import without_references
from spikingbrain_train.conversion.hf_config import (
    GLA_SWA,
    LLAMA,
    QWEN2,
    QWEN3,
    Family,
    parse_hf_config,
)
from spikingbrain_train.conversion.published_form import published_class_lacks
from spikingbrain_train.conversion.window_convention import WINDOW_KEY
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.hf import AUTO_MAP
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE

_KERNEL_CHOICES = {"attn_mode": "chunk", "conv_size": 4, "fuse_cross_entropy": True}
"""Keys of the published class that change no result; a source's own are kept."""
_OWN_KEYS = "spikingbrain_train"
"""Key of what config.json says for readers of the file alone."""


def unexportable_parts(model: ModelConfig) -> list[str]:
    """What of ``model`` has no place in any Hugging Face architecture written here, in words."""
    mixers = model.layer_mixers()
    parallel = [mixer.value for mixer in dict.fromkeys(mixers) if mixer.is_parallel_hybrid]
    parts = [f"layers with two branches ({', '.join(parallel)})"] if parallel else []
    for kind in dict.fromkeys(model.layer_feed_forwards()):
        words = {FeedForward.dense: None, FeedForward.moe: "mixture-of-experts layers"}
        if (part := of_kind(kind, words, "Hugging Face formats")) is not None:
            parts.append(part)
    if model.num_sink_tokens:
        parts.append(f"{model.num_sink_tokens} sink tokens")
    if any(mixer.has_linear_branch for mixer in mixers):
        if model.gla.gate is not GateKind.low_rank:
            parts.append(f"gla.gate={model.gla.gate.value}")
        if model.gla.feature_map is not FeatureMap.relu:
            parts.append(f"gla.feature_map={model.gla.feature_map.value}")
    return parts


def export_family(model: ModelConfig) -> Family:
    """The Hugging Face architecture that computes exactly what ``model`` computes, spikes apart: they add no
    weights, and the formats have no setting for them.

    Raises:
        CheckpointError: no architecture does.
    """
    parts = unexportable_parts(model)
    if parts:
        raise CheckpointError(
            f"no Hugging Face format holds {' and '.join(parts)}; only dense models and the SpikingBrain-7B "
            f"form (gla, swa and full layers, dense feed-forwards, low-rank gate, ReLU features) can be "
            f"exported"
        )
    if any(mixer is not Mixer.full for mixer in model.layer_mixers()):
        return GLA_SWA
    if model.add_qkv_bias and model.qk_layernorm:
        raise CheckpointError(
            "no dense Hugging Face family has both add_qkv_bias and qk_layernorm; export a hybrid instead"
        )
    return QWEN2 if model.add_qkv_bias else QWEN3 if model.qk_layernorm else LLAMA


def hf_config(model: ModelConfig, source: dict[str, Any] | None, dtype: str) -> dict[str, Any]:
    """config.json for ``model``.

    Args:
        model: the architecture.
        source: config.json of the checkpoint that the model was imported from. A dense model of the same
            family keeps it, except for what names code and what ``model`` changed; a hybrid takes token
            ids and dropout from it.
        dtype: name of the exported number format, such as ``"bfloat16"``.

    Raises:
        CheckpointError: no Hugging Face architecture computes this model.
    """
    family = export_family(model)
    source = source or {}
    same_family = source.get("architectures") == [family.architecture]
    if same_family:
        config = without_references(source)
        from_source = parse_hf_config(source, Path(CONFIG_FILE))[1]
        if family is GLA_SWA or from_source != replace(model, spiking=from_source.spiking):
            config.update(_architecture(model, family, config))
    else:
        kept = ("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "use_cache")
        config = {key: source[key] for key in kept if key in source}
        config.update(_architecture(model, family, {}))
    if family is GLA_SWA:
        config.pop("rope_scaling", None)  # rope_parameters instead, see below
        # transformers 4.5x reads torch_dtype only, 5 reads both.
        return config | _readers_keys(model) | {"dtype": dtype, "torch_dtype": dtype}
    config["torch_dtype" if "torch_dtype" in source and "dtype" not in source else "dtype"] = dtype
    return config


def _readers_keys(model: ModelConfig) -> dict[str, Any]:
    """What a hybrid's config.json says beside its architecture, whatever its source said."""
    keys: dict[str, Any] = {WINDOW_KEY: model.sliding_window}
    # AutoTokenizer without remote code reads a model type that it does not know as a plain PretrainedConfig:
    # with a warning, unless a part of the file has the plain configuration's empty model type.
    keys[_OWN_KEYS] = {"model_type": "", "beyond_the_published_class": published_class_lacks(model)}
    return keys


def _architecture(model: ModelConfig, family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """The keys that ``model`` decides, in ``family``'s spelling. ``config`` shows which spelling of rope to
    use."""
    keys: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "max_position_embeddings": model.max_position_embeddings,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "initializer_range": model.init_method_std,
        "norm_eps" if family is GLA_SWA else "rms_norm_eps": model.norm_epsilon,
        "hidden_act": "swish" if family is GLA_SWA else "silu",
    }
    scaling = model.rope_scaling
    rope: dict[str, Any] | None = None
    if scaling.factor != 1.0:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    if family is GLA_SWA:
        # Not rope_scaling: transformers 5 fails on it where it reads the file as a plain PretrainedConfig.
        keys["rope_theta"] = model.rotary_base
        keys["rope_parameters"] = {**rope, "rope_theta": model.rotary_base} if rope else None
    elif "rope_parameters" in config:
        keys["rope_parameters"] = {"rope_type": "default", **(rope or {}), "rope_theta": model.rotary_base}
        keys.update({"rope_theta": model.rotary_base} if "rope_theta" in config else {})
    else:
        keys.update(rope_theta=model.rotary_base, rope_scaling=rope)
    if family is GLA_SWA:
        keys |= {key: config.get(key, value) for key, value in _KERNEL_CHOICES.items()} | _hybrid_keys(model)
    return keys


def _hybrid_keys(model: ModelConfig) -> dict[str, Any]:
    """``sliding_window`` is what makes the published default code see as many tokens as ``model``."""
    mixers = model.layer_mixers()
    full_layers = [layer for layer, mixer in enumerate(mixers) if mixer is Mixer.full]
    return {
        "auto_map": dict(AUTO_MAP),
        "attn_layers": [layer for layer, mixer in enumerate(mixers) if mixer is not Mixer.gla],
        "full_attention_layers": full_layers,
        "sliding_window": model.sliding_window - 1,
        "attention_bias": model.add_qkv_bias,
        "qk_norm": model.qk_layernorm,
        "gate_low_rank_dim": model.gla.gate_low_rank_dim,
        "gate_logit_normalizer": model.gla.gate_logit_normalizer,
        "use_short_conv": False,
        "elementwise_affine": True,
    }
