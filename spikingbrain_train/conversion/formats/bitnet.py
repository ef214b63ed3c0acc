"""Packed ternary weights in a Llama folder, which transformers loads by itself (its quantisation ``bitnet``).

Every linear of a layer is a ``BitLinear`` (transformers/integrations/bitnet.py): ``weight`` [out / 4, in]
uint8 holds four ternary numbers a byte, ``weight_scale`` [1] the reciprocal of their scale, and inputs are
INT8 numbers with a scale for each token. The parameters that the numbers are made of are not there.
"""

from __future__ import annotations

from typing import Any

from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.dense import DenseFormat
from spikingbrain_train.conversion.formats.packed_weights import PackedWeightsFormat

_LINEARS = {Projection.qkv, Projection.attention_output, Projection.mlp_fc1, Projection.mlp_fc2}
"""All that a layer has; transformers takes every linear but the output layer for one of ternary weights."""


_SAID = {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}


class PackedTernaryFormat(PackedWeightsFormat, DenseFormat):
    """LlamaForCausalLM with ``quantization_config``."""

    name = "bitnet"
    holds = "Llama-like models of ternary weights and INT8 inputs, packed"

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
        said = values.get("quantization_config")
        return isinstance(said, dict) and all(said.get(key) == value for key, value in _SAID.items())

    def packs_ternary(self, weight: Weight, model: ModelConfig) -> bool:
        return weight.projection is not None

    def keys_for_readers(self, model: ModelConfig, source: dict[str, Any], dtype: str) -> dict[str, Any]:
        settings = _SAID | {"modules_to_not_convert": ["lm_head"]}
        return super().keys_for_readers(model, source, dtype) | {"quantization_config": settings}

    def notes_on_export(self, model: ModelConfig) -> list[str]:
        return [
            self.note_on_size(model),
            "transformers loads it with accelerate installed, in float32 to the same numbers",
        ]


BITNET = PackedTernaryFormat(
    *("LlamaForCausalLM", "llama"), groups_default_to_heads=True, attention_bias=True, mlp_bias=True
)
