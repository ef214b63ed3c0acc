"""This project's own format with packed ternary weights: two bits each, multiplied as integers on CPUs.

An entry of ``linear_transforms`` is ``"packed": true`` (hf/linears_spikingbrain.py), and its linears hold
``weight`` [out / 4, in] uint8 and ``weight_scale`` [1] in the place of the floats that they are made of.
Whatever else a model has, its mixers, experts, spikes, is as in the format ``spikingbrain``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.linear_transforms import transforms_of
from spikingbrain_train.architecture.ternary import TERNARY_WEIGHTS
from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.conversion.formats.outside_kinds import PACKED_KEY, TRANSFORMS_KEY, packed_transforms
from spikingbrain_train.conversion.formats.packed_weights import NOTE_ON_PARAMETERS, PackedWeightsFormat
from spikingbrain_train.conversion.formats.spikingbrain import SpikingBrainFormat
from spikingbrain_train.conversion.window_convention import WindowConvention


class SpikingBrainPackedFormat(PackedWeightsFormat, SpikingBrainFormat):
    """Models whose projections, or some of them, have ternary weights."""

    name = "spikingbrain_packed"
    holds = "models of any form with ternary weights, packed"
    divides_by_ternary_scales = False
    unpacks_ternary = True

    def reads(self, values: dict[str, Any]) -> bool:
        return self.is_packed(values)

    def is_packed(self, values: dict[str, Any]) -> bool:
        is_ours = values.get("architectures") == [self.architecture]
        return is_ours and bool(packed_transforms(values))

    def read(self, keys: ConfigKeys, window_convention: WindowConvention | None = None) -> ModelConfig:
        if packed_transforms(keys.values) != [TERNARY_WEIGHTS.name]:
            raise keys.refuse(TRANSFORMS_KEY, f"has something packed that is not {TERNARY_WEIGHTS.name}")
        plain = [
            {key: value for key, value in entry.items() if key != PACKED_KEY}
            if isinstance(entry, dict)
            else entry
            for entry in keys.values[TRANSFORMS_KEY]
        ]
        return super().read(ConfigKeys({**keys.values, TRANSFORMS_KEY: plain}, keys.path), window_convention)

    def unsupported(self, model: ModelConfig) -> list[str]:
        parts = super().unsupported(model)
        if parts:
            return parts
        ternary = set(TERNARY_WEIGHTS.projections(model))
        if not ternary:
            return ["models without ternary weights"]
        return [
            f"ternary weights that {kind.name} changes as well"
            for kind in transforms_of(model)
            if kind is not TERNARY_WEIGHTS and kind.changes_weight and ternary & set(kind.projections(model))
        ] + self.no_bytes(model)

    def packs_ternary(self, weight: Weight, model: ModelConfig) -> bool:
        return weight.projection is not None and TERNARY_WEIGHTS.applies(model, *weight.projection)

    def keys(self, model: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
        keys = super().keys(model, config)
        for entry in keys[TRANSFORMS_KEY]:
            if entry["name"] == TERNARY_WEIGHTS.name:
                entry[PACKED_KEY] = True
        return keys

    def notes_on_export(self, model: ModelConfig) -> list[str]:
        return [self.note_on_size(model), *super().notes_on_export(model)]

    def notes_on_import(
        self, folder: Path, config: dict[str, Any], model: ModelConfig, chosen: WindowConvention | None
    ) -> list[str]:
        return [*super().notes_on_import(folder, config, model, chosen), NOTE_ON_PARAMETERS]


SPIKINGBRAIN_PACKED = SpikingBrainPackedFormat()
