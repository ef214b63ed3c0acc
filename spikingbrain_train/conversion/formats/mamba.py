"""Mamba and Falcon-Mamba of transformers: a selective scan in every layer, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.linear_transforms import without_transforms
from spikingbrain_train.architecture.mamba import channels, time_step_rank
from spikingbrain_train.config.mamba import MambaConfig
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.sections import with_sections
from spikingbrain_train.conversion.code_references import without_references
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.conversion.formats.hf_format import HfFormat
from spikingbrain_train.conversion.window_convention import WindowConvention
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE

NAMES: Mapping[str, str] = {
    "embedding": "backbone.embeddings.weight",
    "input_norm": "backbone.layers.{layer}.norm.weight",
    "mamba_in_weight": "backbone.layers.{layer}.mixer.in_proj.weight",
    "mamba_in_bias": "backbone.layers.{layer}.mixer.in_proj.bias",
    "mamba_conv_weight": "backbone.layers.{layer}.mixer.conv1d.weight",
    "mamba_conv_bias": "backbone.layers.{layer}.mixer.conv1d.bias",
    "mamba_x_weight": "backbone.layers.{layer}.mixer.x_proj.weight",
    "mamba_dt_weight": "backbone.layers.{layer}.mixer.dt_proj.weight",
    "mamba_dt_bias": "backbone.layers.{layer}.mixer.dt_proj.bias",
    "mamba_A_log": "backbone.layers.{layer}.mixer.A_log",
    "mamba_D": "backbone.layers.{layer}.mixer.D",
    "mamba_out_weight": "backbone.layers.{layer}.mixer.out_proj.weight",
    "mamba_out_bias": "backbone.layers.{layer}.mixer.out_proj.bias",
    "final_norm": "backbone.norm_f.weight",
    "output": "lm_head.weight",
}
"""Role -> name, in both."""

_MAMBA, _NO_MLP = "mamba", "no_mlp"
"""What kinds of mixers and feed-forwards are called in these formats."""

_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
"""Keys that an export takes from the config.json of a source of another family."""

_ANY_LENGTH = 1 << 20
"""Longest sequence that a model is declared for where config.json does not say: nothing in it ends there."""

_NARROWEST_HEAD = 16


class MambaFormat(HfFormat):
    """A decoder of selective scans without feed-forwards.

    Args:
        architecture: as in ``architectures`` of config.json.
        model_type: as in config.json.
        bc_dt_norm: whether it normalises B, C and step sizes.
    """

    kinds = "selective_scan"
    names = NAMES

    def __init__(self, architecture: str, model_type: str, *, bc_dt_norm: bool) -> None:
        self.architecture = architecture
        self.model_type = model_type
        self.bc_dt_norm = bc_dt_norm
        self.holds = f"models of {architecture.removesuffix('ForCausalLM')}'s form"

    def read(self, keys: ConfigKeys, window_convention: WindowConvention | None = None) -> ModelConfig:
        for key in ("quantization_config", "compression_config"):
            if keys.values.get(key) is not None:
                raise keys.refuse(key, "is not supported; import the unquantised checkpoint")
        if keys.values.get("hidden_act", "silu") not in ("silu", "swish"):
            raise keys.refuse("hidden_act", 'is not supported; the layers compute with "silu"')
        hidden_size = keys.integer("hidden_size")
        # transformers computes with intermediate_size where the file names it, whatever expand says.
        width = keys.integer("intermediate_size", keys.integer("expand", 2) * hidden_size)
        rank = None if keys.values.get("time_step_rank", "auto") == "auto" else keys.integer("time_step_rank")
        heads = _heads(hidden_size)
        mamba = MambaConfig(
            intermediate_size=width,
            state_size=keys.integer("state_size", 16),
            conv_kernel=keys.integer("conv_kernel", 4),
            time_step_rank=rank or -(-hidden_size // 16),
            use_conv_bias=keys.boolean("use_conv_bias", True),
            use_bias=keys.boolean("use_bias", False),
            bc_dt_norm=self.bc_dt_norm,
            time_step_min=keys.number("time_step_min", 0.001),
            time_step_max=keys.number("time_step_max", 0.1),
        )
        if self.bc_dt_norm:
            mamba.mixer_rms_eps = keys.number("mixer_rms_eps", 1e-6)
        return with_sections(ModelConfig)(
            num_layers=keys.integer("num_hidden_layers"),
            hidden_size=hidden_size,
            vocab_size=keys.integer("vocab_size"),
            max_position_embeddings=keys.integer("max_position_embeddings", _ANY_LENGTH),
            norm_epsilon=keys.number("layer_norm_epsilon", 1e-5),
            share_embeddings_and_output_weights=keys.boolean("tie_word_embeddings", True),
            init_method_std=keys.number("initializer_range", 0.1),
            mixers=[self.mixer_of(_MAMBA)],
            feed_forwards=[self.feed_forward_of(_NO_MLP)],
            mamba=mamba,
            # Nothing has heads or a feed-forward; megatron-core asks for sizes that ranks can split.
            num_attention_heads=heads,
            num_query_groups=heads,
            kv_channels=hidden_size // heads,
            ffn_hidden_size=width,
        )

    def unsupported(self, model: ModelConfig) -> list[str]:
        parts = super().unsupported(model)
        if not parts and model.mamba.bc_dt_norm != self.bc_dt_norm:
            parts.append(f"Mamba layers {'without' if self.bc_dt_norm else 'with'} norms of B, C and dt")
        return parts

    def config(self, model: ModelConfig, source: dict[str, Any] | None, dtype: str) -> dict[str, Any]:
        """Of the source's family: its config.json, except for what names code and what ``model`` changed."""
        source = source or {}
        if source.get("architectures") == [self.architecture]:
            config = without_references(source)
            if self.read(ConfigKeys(source, Path(CONFIG_FILE))) != without_transforms(model):
                config.update(self._keys(model))
        else:
            config = {key: source[key] for key in _KEPT if key in source} | self._keys(model)
        return config | {
            "torch_dtype" if "torch_dtype" in source and "dtype" not in source else "dtype": dtype
        }

    def _keys(self, model: ModelConfig) -> dict[str, Any]:
        """What ``model`` decides."""
        mamba = model.mamba
        norms = {"mixer_rms_eps": mamba.mixer_rms_eps} if self.bc_dt_norm else {}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_layers,
            "expand": max(1, channels(model) // model.hidden_size),
            "intermediate_size": channels(model),
            "state_size": mamba.state_size,
            "conv_kernel": mamba.conv_kernel,
            "time_step_rank": time_step_rank(model),
            "time_step_min": mamba.time_step_min,
            "time_step_max": mamba.time_step_max,
            "use_conv_bias": mamba.use_conv_bias,
            "use_bias": mamba.use_bias,
            "layer_norm_epsilon": model.norm_epsilon,
            "tie_word_embeddings": model.share_embeddings_and_output_weights,
            "initializer_range": model.init_method_std,
            "hidden_act": "silu",
            **norms,
        }


def _heads(hidden_size: int) -> int:
    """The largest power of two that divides it into even parts that are no narrower than a small head."""
    heads = 1
    while hidden_size % (4 * heads) == 0 and hidden_size // (2 * heads) >= _NARROWEST_HEAD:
        heads *= 2
    return heads


MAMBA = MambaFormat("MambaForCausalLM", "mamba", bc_dt_norm=False)
FALCON_MAMBA = MambaFormat("FalconMambaForCausalLM", "falcon_mamba", bc_dt_norm=True)
