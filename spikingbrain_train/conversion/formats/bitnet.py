"""Packed ternary weights in a Llama folder, which transformers loads by itself (its quantisation ``bitnet``).

Read and written.

Every linear of a layer is a ``BitLinear`` (transformers/integrations/bitnet.py): ``weight`` [out / 4, in]
uint8 holds four ternary numbers a byte, ``weight_scale`` [1] the reciprocal of their scale, and inputs are
INT8 numbers with a scale for each token. The parameters that the numbers are made of are not there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.linear_transforms import Int8InputsConfig, Projection, TernaryConfig
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.bitnet_masters import BITLINEAR, QUANTIZATION, check_linears, says
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.conversion.formats.dense import DenseFormat
from spikingbrain_train.conversion.formats.packed_weights import NOTE_ON_PARAMETERS, PackedWeightsFormat
from spikingbrain_train.conversion.window_convention import WindowConvention

_LINEARS = {Projection.qkv, Projection.attention_output, Projection.mlp_fc1, Projection.mlp_fc2}
"""All that a layer has; transformers takes every linear but the output layer for one of ternary weights."""


class PackedTernaryFormat(PackedWeightsFormat, DenseFormat):
    """LlamaForCausalLM with ``quantization_config``."""

    name = "bitnet"
    holds = "Llama-like models of ternary weights and INT8 inputs, packed"
    unpacks_ternary = True
    unread = ()

    def reads(self, values: dict[str, Any]) -> bool:
        return self.is_packed(values)

    def read(self, keys: ConfigKeys, window_convention: WindowConvention | None = None) -> ModelConfig:
        others = {key: value for key, value in keys.values.items() if key != QUANTIZATION}
        model = super().read(ConfigKeys(others, keys.path), window_convention)
        if keys.values.get(QUANTIZATION) is not None:
            check_linears(keys)
            linears = [each for each in Projection if each in _LINEARS]
            model.ternary, model.int8_inputs = TernaryConfig(linears), Int8InputsConfig(list(linears))
        return model

    def describes(self, source: dict[str, Any], model: ModelConfig) -> bool:
        return super().describes({**source, QUANTIZATION: None}, model)

    def unsupported(self, model: ModelConfig) -> list[str]:
        """All but ternary weights and INT8 inputs of every linear, which is what its classes compute."""
        parts = super().unsupported(model)
        if parts:
            return parts
        names = ", ".join(each.name for each in Projection if each in _LINEARS)
        others = bool(model.quantization.projections or model.spiking.projections or model.spiking.queries)
        found = [
            (f"other weights than ternary ones in {names}", set(model.ternary.projections) != _LINEARS),
            (f"other inputs than INT8 ones of {names}", set(model.int8_inputs.projections) != _LINEARS),
            ("spikes or INT8 weights", others),
            ("INT8 keys and values", model.quantization.keys_and_values),
        ]
        return [words for words, is_so in found if is_so] + self.no_bytes(model)

    def is_packed(self, values: dict[str, Any]) -> bool:
        return says(values, BITLINEAR)

    def packs_ternary(self, weight: Weight, model: ModelConfig) -> bool:
        return weight.projection is not None

    def keys_for_readers(self, model: ModelConfig, source: dict[str, Any], dtype: str) -> dict[str, Any]:
        settings = BITLINEAR | {"modules_to_not_convert": ["lm_head"]}
        said = source[QUANTIZATION] if self.is_packed(source) else settings
        return super().keys_for_readers(model, source, dtype) | {QUANTIZATION: said}

    def notes_on_export(self, model: ModelConfig) -> list[str]:
        return [
            self.note_on_size(model),
            "transformers loads it with accelerate installed, in float32 to the same numbers",
        ]

    def notes_on_import(
        self, folder: Path, config: dict[str, Any], model: ModelConfig, chosen: WindowConvention | None
    ) -> list[str]:
        return [*super().notes_on_import(folder, config, model, chosen), NOTE_ON_PARAMETERS]


BITNET = PackedTernaryFormat(
    *("LlamaForCausalLM", "llama"), groups_default_to_heads=True, attention_bias=True, mlp_bias=True
)
