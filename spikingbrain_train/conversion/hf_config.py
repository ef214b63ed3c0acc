"""config.json of a Hugging Face checkpoint -> :class:`ModelConfig`.

Reading refuses, with a sentence, every setting that the model would compute differently; it never guesses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.config.model import (
    GatedLinearAttentionConfig,
    Mixer,
    ModelConfig,
    RopeScalingConfig,
)
from spikingbrain_train.conversion.hf_names import GLA_SWA_NAMES, LLAMA_NAMES
from spikingbrain_train.conversion.safetensors_io import SafetensorsReader
from spikingbrain_train.conversion.window_convention import (
    WINDOW_KEY,
    WindowConvention,
    default_convention,
)
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.hf import ARCHITECTURES, DEFAULT_ROPE_THETA
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE, load_config_json
from spikingbrain_train.storage.stored_layers import check_number_of_layers


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture that checkpoints are read from and written to."""

    architecture: str
    """Class name, as in ``architectures`` of config.json."""
    model_type: str
    """``model_type`` of config.json."""
    rope_theta: float
    """Rotary base where config.json names none, as its class in transformers has it."""
    names: Mapping[str, str]
    """Its column of the mapping table: role -> tensor name."""


LLAMA = Family("LlamaForCausalLM", "llama", 10000.0, LLAMA_NAMES)
QWEN2 = Family("Qwen2ForCausalLM", "qwen2", 10000.0, LLAMA_NAMES)
QWEN3 = Family("Qwen3ForCausalLM", "qwen3", 10000.0, LLAMA_NAMES)
GLA_SWA = Family(ARCHITECTURES[0], "gla_swa", DEFAULT_ROPE_THETA, GLA_SWA_NAMES)
FAMILIES = {family.architecture: family for family in (LLAMA, QWEN2, QWEN3, GLA_SWA)}


class _Settings:
    """Typed access to the keys of one config.json; every complaint names the file and the key."""

    def __init__(self, values: dict[str, Any], path: Path):
        self.values = values
        self.path = path

    def refuse(self, key: str, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {key} = {json.dumps(self.values.get(key))} {reason}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(
                f"{self.path}: {key} is missing; a complete config.json of the model is needed"
            )
        return default

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.refuse(key, f"must be a whole number of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.refuse(key, "must be a number above 0")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "must be true or false")
        return value

    def layers(self, key: str, default: list[int], num_layers: int) -> list[int]:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, list) or not all(type(i) is int and 0 <= i < num_layers for i in value):
            raise self.refuse(key, f"must list 0-based layer indices below num_hidden_layers = {num_layers}")
        return value


def read_hf_config(
    folder: Path, window_convention: WindowConvention | None = None
) -> tuple[Family, ModelConfig]:
    """Family and architecture of the checkpoint in ``folder``, from its config.json.

    Args:
        folder: where config.json lies.
        window_convention: how to read ``sliding_window`` of a gla_swa config that does not say what it
            counts; None reads it as the published default code does.

    Raises:
        CheckpointError: config.json is missing or malformed, or describes something this model does not
    compute.
    """
    values = load_config_json(folder)
    setting = f"{folder / CONFIG_FILE}: num_hidden_layers"
    check_number_of_layers(setting, values.get("num_hidden_layers"), lambda: SafetensorsReader(folder).specs)
    return parse_hf_config(values, folder / CONFIG_FILE, window_convention)


def parse_hf_config(
    values: dict[str, Any], path: Path, window_convention: WindowConvention | None = None
) -> tuple[Family, ModelConfig]:
    """:func:`read_hf_config` for a config that is already loaded; ``path`` is what messages call it."""
    family = _family(values, path)
    settings = _Settings(values, path)
    for key in ("quantization_config", "compression_config"):
        if values.get(key) is not None:
            raise settings.refuse(key, "is not supported; import the unquantised checkpoint")
    if "quant_weight_group_size" in values:
        raise settings.refuse(
            "quant_weight_group_size", "marks a W8ASpike checkpoint; import the unquantised checkpoint"
        )
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise settings.refuse(
            "hidden_act", 'is not supported; the feed-forward is SwiGLU ("silu" or "swish")'
        )
    for key in ("attention_bias", "mlp_bias"):
        if family is not GLA_SWA and settings.boolean(key, False):
            reason = (
                "puts a bias on the output projection"
                if key == "attention_bias"
                else "puts biases on the FFN"
            )
            raise settings.refuse(
                key, f"{reason}, which this model does not have; such checkpoints cannot be imported"
            )

    num_heads = settings.integer("num_attention_heads")
    hidden_size = settings.integer("hidden_size")
    num_layers = settings.integer("num_hidden_layers")
    if values.get("head_dim") is None and family is not QWEN3 and hidden_size % num_heads:
        raise settings.refuse(
            "hidden_size", f"is not divisible by num_attention_heads = {num_heads}; set head_dim"
        )
    num_groups = settings.integer("num_key_value_heads", num_heads if family in (LLAMA, GLA_SWA) else None)
    if num_heads % num_groups:
        raise settings.refuse("num_key_value_heads", f"does not divide num_attention_heads = {num_heads}")
    head_dim = settings.integer("head_dim", 128 if family is QWEN3 else hidden_size // num_heads)
    if head_dim % 2:
        raise settings.refuse("head_dim", "must be even for rotary positions")
    rotary_base, rope_scaling = _rope(settings, family)
    model = ModelConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=settings.integer("intermediate_size"),
        num_attention_heads=num_heads,
        num_query_groups=num_groups,
        kv_channels=head_dim,
        vocab_size=settings.integer("vocab_size"),
        max_position_embeddings=settings.integer("max_position_embeddings"),
        mixers=[Mixer.full],
        rotary_base=rotary_base,
        rope_scaling=rope_scaling,
        norm_epsilon=settings.number("norm_eps" if family is GLA_SWA else "rms_norm_eps", 1e-6),
        add_qkv_bias=family is QWEN2,
        qk_layernorm=family is QWEN3,
        share_embeddings_and_output_weights=settings.boolean("tie_word_embeddings", False),
        init_method_std=settings.number("initializer_range", 0.02),
    )
    if family is GLA_SWA:
        _read_hybrid(settings, model, window_convention or default_convention(values))
    else:
        _refuse_windows(settings, num_layers)
    return family, model


def _family(values: dict[str, Any], path: Path) -> Family:
    architectures = values.get("architectures") or [
        family.architecture for family in FAMILIES.values() if family.model_type == values.get("model_type")
    ]
    known = ", ".join(FAMILIES)
    if (
        not isinstance(architectures, list)
        or len(architectures) != 1
        or not isinstance(architectures[0], str)
    ):
        raise CheckpointError(
            f"{path}: architectures must name one of {known}, got {json.dumps(architectures)}"
        )
    if architectures[0] not in FAMILIES:
        raise CheckpointError(
            f"{path}: architecture {architectures[0]} is not supported; supported are {known}"
        )
    return FAMILIES[architectures[0]]


def _rope(settings: _Settings, family: Family) -> tuple[float, RopeScalingConfig]:
    """Rotary base and scaling: ``rope_theta``, ``rope_scaling``, or transformers 5's ``rope_parameters``."""
    values = settings.values
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = (
        _Settings(values.get(key) or {}, settings.path) if isinstance(values.get(key) or {}, dict) else None
    )
    if rope is None or any(isinstance(value, dict) for value in rope.values.values()):
        raise settings.refuse(key, "must be one set of rotary settings for all layers")
    for place in (settings, rope):
        if place.values.get("partial_rotary_factor", 1.0) != 1.0:
            raise place.refuse(
                "partial_rotary_factor", "is not supported; rotary positions cover the whole head"
            )
    base = settings.number("rope_theta", rope.number("rope_theta", family.rope_theta))
    if rope.number("rope_theta", base) != base:
        raise settings.refuse(
            "rope_theta", f"contradicts rope_theta = {rope.values['rope_theta']} in {key}; keep one"
        )
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind == "default":
        return base, RopeScalingConfig()
    if kind != "llama3":
        raise settings.refuse(key, 'has an unsupported rope_type; supported are "default" and "llama3"')
    return base, RopeScalingConfig(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
    )


def _refuse_windows(settings: _Settings, num_layers: int) -> None:
    """A dense source attends to everything: Qwen's optional sliding windows are refused where they take
    effect, which is as transformers' Qwen2Config has it: ``layer_types`` decides if it is there, else layers
    from ``max_window_layers`` on have the window, unless ``sliding_window`` is null."""
    layer_types = settings.values.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise settings.refuse("layer_types", "must list the kind of attention of each layer")
    if any(kind != "full_attention" for kind in layer_types):
        raise settings.refuse(
            "layer_types", "has layers other than full_attention, which a dense source must not have"
        )
    has_window = settings.values.get("sliding_window", 4096) is not None
    windowed = settings.boolean("use_sliding_window", False) and has_window and not layer_types
    if windowed and settings.integer("max_window_layers", 28, minimum=0) < num_layers:
        raise settings.refuse(
            "use_sliding_window", "gives some layers a window; a dense source must attend to everything"
        )


def _read_hybrid(settings: _Settings, model: ModelConfig, convention: WindowConvention) -> None:
    """The keys that only the published gla_swa format (and this project's optional additions) has."""
    if settings.boolean("use_short_conv", False):
        raise settings.refuse("use_short_conv", "is not supported; GLA layers have no short convolution")
    if not settings.boolean("elementwise_affine", True):
        raise settings.refuse("elementwise_affine", "is not supported; the output norm has a weight")
    model.add_qkv_bias = settings.boolean("attention_bias", True)
    model.qk_layernorm = settings.boolean("qk_norm", False)
    model.gla = GatedLinearAttentionConfig(
        gate_low_rank_dim=settings.integer("gate_low_rank_dim", 16),
        gate_logit_normalizer=settings.number("gate_logit_normalizer", 16.0),
    )
    softmax_layers = settings.layers("attn_layers", list(range(1, model.num_layers, 2)), model.num_layers)
    full_layers = settings.layers("full_attention_layers", [], model.num_layers)
    if not set(full_layers) <= set(softmax_layers):
        raise settings.refuse("full_attention_layers", "must also be listed in attn_layers")
    if settings.values.get(WINDOW_KEY) is not None:
        model.sliding_window = settings.integer(WINDOW_KEY)
        if settings.values.get("sliding_window", model.sliding_window - 1) != model.sliding_window - 1:
            raise settings.refuse(
                "sliding_window", f"contradicts {WINDOW_KEY} = {model.sliding_window}, which is one more"
            )
    elif "sliding_window" in settings.values and settings.values["sliding_window"] is None:
        full_layers = softmax_layers
    else:
        model.sliding_window = convention.window(settings.integer("sliding_window", 4096))
    model.mixers = shortest_pattern(
        [
            Mixer.gla if layer not in softmax_layers else Mixer.full if layer in full_layers else Mixer.swa
            for layer in range(model.num_layers)
        ]
    )


def shortest_pattern(mixers: list[Mixer]) -> list[Mixer]:
    """The shortest list that, repeated, spells ``mixers``: 28 alternating layers become [gla, swa]."""
    for length in range(1, len(mixers)):
        if all(mixer is mixers[layer % length] for layer, mixer in enumerate(mixers)):
            return mixers[:length]
    return mixers
