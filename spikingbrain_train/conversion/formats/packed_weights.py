"""What formats of packed ternary weights have in common: four numbers in a byte, and a scale beside them."""

from __future__ import annotations

from spikingbrain_train.architecture.int8_inputs import INT8_INPUTS
from spikingbrain_train.architecture.layers import model_weights
from spikingbrain_train.architecture.linear_transforms import LinearTransformKind
from spikingbrain_train.architecture.ternary import TERNARY_WEIGHTS
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.hf_format import HfFormat

NOTE_ON_PARAMETERS = (
    "packed ternary weights became parameters that are rounded to just these numbers and scales; those that "
    "they were made of in training are not in the folder"
)
"""Of imports."""


class PackedWeightsFormat(HfFormat):
    """A format that holds ternary numbers and not the parameters that they are made of.

    Which weights these are is for :meth:`packs_ternary` to say.
    """

    is_for_inference = True

    def no_bytes(self, model: ModelConfig) -> list[str]:
        """What of ``model`` does not lie four in a byte, in words."""
        is_narrow = any(
            rows % 4
            for _, weight in model_weights(model)
            for rows, *_ in (weight.shapes if self.packs_ternary(weight, model) else ())
        )
        return ["matrices of a number of rows that 4 does not divide"] if is_narrow else []

    def leaves_out(self, model: ModelConfig) -> list[LinearTransformKind]:
        """What :meth:`unsupported` lets through beside the two that packed weights are for."""
        packed = (TERNARY_WEIGHTS, INT8_INPUTS)
        return [kind for kind in super().leaves_out(model) if kind not in packed]

    def note_on_size(self, model: ModelConfig) -> str:
        """What the packed weights take, and what is not there, for the report."""
        packed = sum(weight.numel for _, weight in model_weights(model) if self.packs_ternary(weight, model))
        return (
            f"{packed:,} ternary weights take {packed / 4e6:,.1f} MB, four in a byte, in the place of "
            f"{packed / 5e5:,.1f} MB in bfloat16; the parameters that they are made of are not in the "
            f"folder: keep the checkpoint to train on"
        )
