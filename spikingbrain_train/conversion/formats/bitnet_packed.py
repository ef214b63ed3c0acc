"""BitNetForCausalLM as published: packed ternary weights, each with a scale, and no floats behind them.

``quantization_config`` of the class ``autobitlinear`` in the mode ``offline`` (arXiv 2504.12285; the layout
of microsoft/bitnet-b1.58-2B-4T): ``weight`` [out / 4, in] uint8 holds four ternary numbers a byte,
``weight_scale`` [1] what products are multiplied by, and inputs are INT8 numbers with a scale for each token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.layers import model_weights
from spikingbrain_train.architecture.linear_transforms import LinearTransformKind
from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.bitnet_masters import (
    OFFLINE,
    BitNetMastersFormat,
    is_packed,
    is_rounded,
)
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.conversion.window_convention import WindowConvention


class BitNetPackedFormat(BitNetMastersFormat):
    """Every linear of a layer is packed."""

    name = "bitnet_packed"
    holds = "dense models with the sub-norms of BitNet b1.58 2B4T, packed"
    is_for_inference = True
    quantization = OFFLINE
    divides_by_ternary_scales = False
    unpacks_ternary = True

    def reads(self, values: dict[str, Any]) -> bool:
        return is_packed(values)

    def refuse(self, keys: ConfigKeys) -> None:
        super().refuse(keys)
        if keys.boolean("attention_bias", False):
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
        narrow = any(
            rows % 4
            for _, weight in model_weights(model)
            for rows, *_ in (weight.shapes if weight.projection is not None else ())
        )
        found = [
            ("linears without ternary weights and INT8 inputs, or with anything else", not is_rounded(model)),
            ("INT8 keys and values", model.quantization.keys_and_values),
            ("biases, which its class multiplies by the scale of the weights", model.add_output_bias),
            ("matrices of a number of rows that 4 does not divide", narrow),
        ]
        return [words for words, is_so in found if is_so]

    def leaves_out(self, model: ModelConfig) -> list[LinearTransformKind]:
        return []  # what it does not compute, it does not hold

    def packs_ternary(self, weight: Weight, model: ModelConfig) -> bool:
        return weight.projection is not None

    def notes_on_export(self, model: ModelConfig) -> list[str]:
        return [
            "the folder holds ternary weights, four in a byte, and not the parameters that they are made of: "
            "keep the checkpoint to train on; transformers loads it with accelerate installed, in the number "
            "format of the folder: in one of float32 (--dtype float32) it computes the same numbers"
        ]

    def notes_on_import(
        self, folder: Path, config: dict[str, Any], model: ModelConfig, chosen: WindowConvention | None
    ) -> list[str]:
        return [
            *super().notes_on_import(folder, config, model, chosen),
            "packed ternary weights became parameters that are rounded to just these numbers and scales; "
            "those that they were made of in training are not in the folder",
        ]


BITNET_PACKED = BitNetPackedFormat("BitNetForCausalLM", "bitnet", attention_bias=True, sub_norms=True)
