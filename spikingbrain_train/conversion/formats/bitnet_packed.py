"""BitNetForCausalLM as published: packed ternary weights, each with a scale, and no floats behind them.

``quantization_config`` of the class ``autobitlinear`` in the mode ``offline`` (arXiv 2504.12285; the layout
of microsoft/bitnet-b1.58-2B-4T): ``weight`` [out / 4, in] uint8 holds four ternary numbers a byte,
``weight_scale`` [1] what products are multiplied by, and inputs are INT8 numbers with a scale for each token.
In the class ``bitlinear`` ``weight_scale`` is what they are divided by, and biases are added behind that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.bitnet_masters import (
    BITLINEAR,
    OFFLINE,
    BitNetMastersFormat,
    is_rounded,
    says,
)
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.conversion.formats.packed_weights import NOTE_ON_PARAMETERS, PackedWeightsFormat
from spikingbrain_train.conversion.window_convention import WindowConvention


class BitNetPackedFormat(PackedWeightsFormat, BitNetMastersFormat):
    """Every linear of a layer is packed."""

    name = "bitnet_packed"
    holds = "dense models with the sub-norms of BitNet b1.58 2B4T, packed"
    quantization = OFFLINE
    divides_by_ternary_scales = False
    unpacks_ternary = True
    scales_biases = True
    """Whether its class multiplies biases by the scale of the weights as well."""

    def reads(self, values: dict[str, Any]) -> bool:
        return self.is_packed(values)

    def is_packed(self, values: dict[str, Any]) -> bool:
        return says(values, self.quantization)

    def refuse(self, keys: ConfigKeys) -> None:
        super().refuse(keys)
        if self.scales_biases and keys.boolean("attention_bias", False):
            raise keys.refuse(
                "attention_bias",
                "is not read beside packed weights, whose class multiplies biases by weight_scale as well; "
                "import the unquantised checkpoint",
            )

    def unsupported(self, model: ModelConfig) -> list[str]:
        """All but ternary weights and INT8 inputs of every linear, which is what its class computes."""
        parts = super().unsupported(model)
        if parts:
            return parts
        found = [
            ("linears without ternary weights and INT8 inputs, or with anything else", not is_rounded(model)),
            ("INT8 keys and values", model.quantization.keys_and_values),
            (
                "biases, which its class multiplies by the scale of the weights",
                self.scales_biases and model.add_output_bias,
            ),
        ]
        return [words for words, is_so in found if is_so] + self.no_bytes(model)

    def packs_ternary(self, weight: Weight, model: ModelConfig) -> bool:
        return weight.projection is not None

    def notes_on_export(self, model: ModelConfig) -> list[str]:
        return [
            self.note_on_size(model),
            "transformers loads it with accelerate installed, in the number format of the folder: in one of "
            "float32 (--dtype float32) it computes the same numbers",
        ]

    def notes_on_import(
        self, folder: Path, config: dict[str, Any], model: ModelConfig, chosen: WindowConvention | None
    ) -> list[str]:
        return [
            *super().notes_on_import(folder, config, model, chosen),
            NOTE_ON_PARAMETERS,
        ]


class BitNetBitLinearFormat(BitNetPackedFormat):
    """The same by transformers' class ``BitLinear``, which computes in integers."""

    name = "bitnet_bitlinear"
    holds = "dense models with the sub-norms of BitNet b1.58 2B4T, packed for transformers' class BitLinear"
    quantization = BITLINEAR
    divides_by_ternary_scales = True
    scales_biases = False


BITNET_PACKED = BitNetPackedFormat("BitNetForCausalLM", "bitnet", attention_bias=True, sub_norms=True)
BITNET_BITLINEAR = BitNetBitLinearFormat("BitNetForCausalLM", "bitnet", attention_bias=True, sub_norms=True)
