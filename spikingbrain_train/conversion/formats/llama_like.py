"""What formats whose config.json is written like Llama's have in common: sizes, rotary positions, norms."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

from spikingbrain_train.architecture.layers import feed_forwards_of
from spikingbrain_train.config.model import ActivationFunc, ModelConfig
from spikingbrain_train.config.sections import with_sections
from spikingbrain_train.conversion.code_references import without_references
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.conversion.formats.hf_format import HfFormat
from spikingbrain_train.conversion.formats.rope import declared_positions, read_rope
from spikingbrain_train.conversion.window_convention import WindowConvention

_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "use_cache")
"""Keys that an export takes from the config.json of a source of another family."""
THRESHOLD = "hidden_act_param"
"""Key of fatrelu's threshold, as in the published configs of ProSparse."""


def _reads_activation(model: ModelConfig) -> bool:
    """Whether a feed-forward of the model has a gate that goes through its activation."""
    return any("activation_func" in kind.settings(model) for kind in feed_forwards_of(model))


class LlamaLikeFormat(HfFormat):
    """A decoder of equal layers, described by the keys of transformers' LlamaConfig."""

    rope_theta: float = 10000.0
    """Rotary base where config.json names none, as its class in transformers has it."""
    head_dim: int | None = None
    """Width of a head where config.json names none; None is hidden_size / num_attention_heads."""
    groups_default_to_heads: bool = True
    """Whether there are as many query groups as heads where config.json names none; else it must."""
    norm_key: str = "rms_norm_eps"
    """Key of the norms' epsilon."""
    unread: Collection[str] = ()
    """Keys of a source's config.json that an export does not take over: what says of its tensors that they
    are packed."""
    activations: Mapping[ActivationFunc, str] = {
        ActivationFunc.silu: "silu",
        ActivationFunc.relu: "relu",
        ActivationFunc.relu2: "relu2",
    }
    """What ``hidden_act`` calls those that its modelling code computes."""

    def read(self, keys: ConfigKeys, window_convention: WindowConvention | None = None) -> ModelConfig:
        self.refuse(keys)
        num_heads = keys.integer("num_attention_heads")
        hidden_size = keys.integer("hidden_size")
        num_layers = keys.integer("num_hidden_layers")
        if keys.values.get("head_dim") is None and self.head_dim is None and hidden_size % num_heads:
            raise keys.refuse(
                "hidden_size", f"is not divisible by num_attention_heads = {num_heads}; set head_dim"
            )
        num_groups = keys.integer("num_key_value_heads", num_heads if self.groups_default_to_heads else None)
        if num_heads % num_groups:
            raise keys.refuse("num_key_value_heads", f"does not divide num_attention_heads = {num_heads}")
        kv_channels = keys.integer("head_dim", self.head_dim or hidden_size // num_heads)
        if kv_channels % 2:
            raise keys.refuse("head_dim", "must be even for rotary positions")
        max_positions = keys.integer("max_position_embeddings")
        rotary_base, rope_scaling = read_rope(keys, self.rope_theta, max_positions, kv_channels)
        model = with_sections(ModelConfig)(
            num_layers=num_layers,
            hidden_size=hidden_size,
            ffn_hidden_size=keys.integer("intermediate_size"),
            num_attention_heads=num_heads,
            num_query_groups=num_groups,
            kv_channels=kv_channels,
            vocab_size=keys.integer("vocab_size"),
            max_position_embeddings=max_positions,
            rotary_base=rotary_base,
            rope_scaling=rope_scaling,
            norm_epsilon=keys.number(self.norm_key, 1e-6),
            share_embeddings_and_output_weights=keys.boolean("tie_word_embeddings", False),
            init_method_std=keys.number("initializer_range", 0.02),
        )
        model.activation_func = self._activation(keys)
        if model.activation_func is ActivationFunc.fatrelu:
            model.fatrelu_threshold = keys.number(THRESHOLD, minimum=0.0)
        self.read_layers(keys, model, window_convention)
        return model

    def _activation(self, keys: ConfigKeys) -> ActivationFunc:
        known = {name: func for func, name in self.activations.items()}
        if ActivationFunc.silu in self.activations:
            known |= {"silu": ActivationFunc.silu, "swish": ActivationFunc.silu}
        name = str(keys.values.get("hidden_act") or next(iter(known)))
        if name not in known:
            raise keys.refuse(
                "hidden_act", f"is not supported; {self.architecture} is read with {', '.join(known)}"
            )
        return known[name]

    def unsupported(self, model: ModelConfig) -> list[str]:
        parts = super().unsupported(model)
        if _reads_activation(model) and model.activation_func not in self.activations:
            parts.append(f"feed-forwards with model.activation_func={model.activation_func.value}")
        return parts

    def refuse(self, keys: ConfigKeys) -> None:
        """Refuse what no model here computes. Raises CheckpointError."""
        for key in ("quantization_config", "compression_config"):
            if keys.values.get(key) is not None:
                raise keys.refuse(key, "is not supported; import the unquantised checkpoint")
        if "quant_weight_group_size" in keys.values:
            raise keys.refuse(
                "quant_weight_group_size", "marks a W8ASpike checkpoint; import the unquantised checkpoint"
            )

    @abstractmethod
    def read_layers(
        self, keys: ConfigKeys, model: ModelConfig, window_convention: WindowConvention | None
    ) -> None:
        """Fill in what is in the layers of ``model``, of which sizes are read. Raises CheckpointError."""

    def config(self, model: ModelConfig, source: dict[str, Any] | None, dtype: str) -> dict[str, Any]:
        """Of the source's family: its config.json, except for what names code and what ``model`` changed.

        A model of another family takes token ids and dropout from it.
        """
        source = {key: value for key, value in (source or {}).items() if key not in self.unread}
        if source.get("architectures") != [self.architecture]:
            config = {key: source[key] for key in _KEPT if key in source}
            config.update(self.keys(model, {}))
        else:
            config = without_references(source)
            if not self.describes(source, model):
                config.update(self.keys(model, config))
        return config | self.keys_for_readers(model, source, dtype)

    def describes(self, source: dict[str, Any], model: ModelConfig) -> bool:
        """Whether a config.json of this family already says all that ``model`` decides."""
        return False

    def keys(self, model: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
        """What ``model`` decides. ``config`` shows which spelling to use where there are several."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.ffn_hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_query_groups,
            "head_dim": model.kv_channels,
            "max_position_embeddings": declared_positions(model.rope_scaling, model.max_position_embeddings),
            "tie_word_embeddings": model.share_embeddings_and_output_weights,
            "initializer_range": model.init_method_std,
            self.norm_key: model.norm_epsilon,
            **self._activation_keys(model),
        }

    def _activation_keys(self, model: ModelConfig) -> dict[str, Any]:
        # A kind from outside does not read it: the key says what this code would compute anyway.
        func = model.activation_func if model.activation_func in self.activations else ActivationFunc.silu
        threshold = {THRESHOLD: model.fatrelu_threshold} if func is ActivationFunc.fatrelu else {}
        return {"hidden_act": self.activations[func], **threshold}

    @abstractmethod
    def keys_for_readers(self, model: ModelConfig, source: dict[str, Any], dtype: str) -> dict[str, Any]:
        """What is said beside the architecture, whatever the source said: the number format."""
