"""BitNetForCausalLM of transformers: sub-norms, squared ReLU, and floats that ternary weights are made of.

``quantization_config`` of the class ``autobitlinear`` in the mode ``online`` rounds weights to ternary and
inputs to INT8 numbers in every forward pass (arXiv 2504.12285, section 2). Without that key the same class
multiplies by the floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.linear_transforms import LinearTransformKind, transforms_of
from spikingbrain_train.config.linear_transforms import Int8InputsConfig, Projection, TernaryConfig
from spikingbrain_train.config.model import ActivationFunc, ModelConfig
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.conversion.formats.dense import DenseFormat
from spikingbrain_train.conversion.window_convention import WindowConvention
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE

QUANTIZATION = "quantization_config"
ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
OFFLINE = ONLINE | {"quantization_mode": "offline"}
BITLINEAR = OFFLINE | {"linear_class": "bitlinear"}
"""Those of packed weights: here in conversion/formats/bitnet_packed.py, of a Llama in bitnet.py."""
_DEFAULTS = {"linear_class": "bitlinear", "quantization_mode": "offline"}
"""What transformers takes ``quantization_config`` to say where it is silent, as older folders are."""
_OUTPUT = "lm_head"
_LINEARS = [each for each in Projection if each is not Projection.gate]


class BitNetMastersFormat(DenseFormat):
    """Every linear of a layer rounded in the forward pass, or none."""

    name = "bitnet_masters"
    holds = "dense models with the sub-norms of BitNet b1.58 2B4T"
    unread = ()
    quantization: dict[str, str] = ONLINE
    """What ``quantization_config`` says of models whose linears are rounded."""
    rope_theta = 500000.0
    activations: Mapping[ActivationFunc, str] = {  # its class's own first
        each: each.value for each in (ActivationFunc.relu2, ActivationFunc.silu, ActivationFunc.relu)
    }

    def reads(self, values: dict[str, Any]) -> bool:
        return not (says(values, OFFLINE) or says(values, BITLINEAR))

    def read(self, keys: ConfigKeys, window_convention: WindowConvention | None = None) -> ModelConfig:
        model = super().read(ConfigKeys({self.norm_key: 1e-5, **keys.values}, keys.path), window_convention)
        if keys.values.get(QUANTIZATION) is not None:
            model.ternary, model.int8_inputs = TernaryConfig(list(_LINEARS)), Int8InputsConfig(list(_LINEARS))
        return model

    def refuse(self, keys: ConfigKeys) -> None:
        others = {key: value for key, value in keys.values.items() if key != QUANTIZATION}
        super().refuse(ConfigKeys(others, keys.path))
        heads, hidden = keys.integer("num_attention_heads"), keys.integer("hidden_size")
        if heads * keys.integer("head_dim", hidden // heads) != hidden:
            raise keys.refuse(
                "head_dim",
                f"times num_attention_heads must be hidden_size = {hidden}, the width of attn_sub_norm",
            )
        said = keys.values.get(QUANTIZATION)
        if said is None:
            return
        if not says(keys.values, self.quantization):
            raise keys.refuse(
                QUANTIZATION,
                "is read in quantization_mode online with linear_class autobitlinear beside the weights that "
                "ternary numbers are made of, offline with either class beside packed ones; import the "
                "unquantised checkpoint",
            )
        check_linears(keys)

    def unsupported(self, model: ModelConfig) -> list[str]:
        parts = super().unsupported(model)
        if model.kv_channels * model.num_attention_heads != model.hidden_size:
            parts.append("heads that together are not as wide as hidden_size")
        return parts

    def leaves_out(self, model: ModelConfig) -> list[LinearTransformKind]:
        return [] if is_rounded(model) else super().leaves_out(model)

    def describes(self, source: dict[str, Any], model: ModelConfig) -> bool:
        described = self.read(ConfigKeys(source, Path(CONFIG_FILE)))
        return super().describes({**source, QUANTIZATION: None}, model) and is_rounded(model) == is_rounded(
            described
        )

    def config(self, model: ModelConfig, source: dict[str, Any] | None, dtype: str) -> dict[str, Any]:
        if source is not None and source.get(QUANTIZATION) is not None:
            # A source may have been of the other mode, and says all else alike.
            source = {**source, QUANTIZATION: source[QUANTIZATION] | self.quantization}
        config = super().config(model, source, dtype)
        if not is_rounded(model):
            config.pop(QUANTIZATION, None)
        elif config.get(QUANTIZATION) is None:
            config[QUANTIZATION] = dict(self.quantization)
        return config

    def notes_on_export(self, model: ModelConfig) -> list[str]:
        if not is_rounded(model):
            return []
        return ["transformers rounds weights and inputs in every forward pass; it needs accelerate installed"]


def is_rounded(model: ModelConfig) -> bool:
    """Whether every linear of a layer has ternary weights and INT8 inputs, and nothing else is done."""
    linears = set(_LINEARS)
    both = set(model.ternary.projections) == set(model.int8_inputs.projections) == linears
    return both and len(transforms_of(model)) == 2


def check_linears(keys: ConfigKeys) -> None:
    """Every linear of a layer is converted, and has no norm of its own. Raises CheckpointError."""
    said = keys.values[QUANTIZATION]
    if said.get("use_rms_norm") or said.get("modules_to_not_convert") not in (None, [_OUTPUT]):
        raise keys.refuse(
            QUANTIZATION,
            f"is read without use_rms_norm, and with modules_to_not_convert null or {_OUTPUT} alone",
        )


def says(values: dict[str, Any], asked: Mapping[str, str]) -> bool:
    """Whether the ``quantization_config`` of a config.json says what is asked for."""
    said = values.get(QUANTIZATION)
    return isinstance(said, dict) and asked.items() <= (_DEFAULTS | said).items()


BITNET_MASTERS = BitNetMastersFormat("BitNetForCausalLM", "bitnet", attention_bias=True, sub_norms=True)
