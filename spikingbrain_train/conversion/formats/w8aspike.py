"""The published W8ASpike form of SpikingBrain-7B (arXiv 2509.05276, section 3.3): weights beside scales.

Weights are ordinary floats; ``<linear>.weight_quantizer.scales`` [out, in / 128, 1] says to what the
published class rounds them when it multiplies. Its config.json is that of the plain form. Where it has spikes
is fixed: in front of q, k, v, output, gate and up projection and of the gate of linear attention, which is
one matrix. These multiply by INT8 weights; the down projection has scales, but is used as it is. Softmax
layers spike their queries and round keys and values to INT8. k is 3, a group 128 weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.linear_transforms import (
    GateEncoding,
    Projection,
    QuantizationConfig,
    SpikingConfig,
)
from spikingbrain_train.config.model import GateKind, ModelConfig
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.conversion.formats.gla_swa import NAMES, GatedLinearSlidingWindowFormat
from spikingbrain_train.conversion.formats.quantization import LINEARS
from spikingbrain_train.conversion.formats.spiking import spiking_keys
from spikingbrain_train.conversion.window_convention import WindowConvention
from spikingbrain_train.hf import QUANT_METHOD

_GROUP_SIZE, _K = 128, 3.0
_ROUNDED = [Projection.qkv, Projection.gate, Projection.attention_output, Projection.mlp_fc1]
_LAYOUT_KEY = "quant_weight_group_size"
_WITH_SCALES = (
    *("q_weight", "k_weight", "v_weight", "o_weight", "gate_weight"),
    *("mlp_gate_weight", "mlp_up_weight", "mlp_down_weight"),
)


def _scale_name(name: str) -> str:
    return name.removesuffix(".weight") + ".weight_quantizer.scales"


class PublishedW8ASpikeFormat(GatedLinearSlidingWindowFormat):
    """The classes of ``gla_swa`` with fake-quantised linears."""

    name = "w8aspike"
    holds = "the published W8ASpike form (scales beside the weights)"
    names: Mapping[str, str] = {
        **NAMES,
        **{f"{role}_scales": _scale_name(NAMES[role]) for role in _WITH_SCALES},
    }
    keeps_weights_beside_scales = True

    def refuse(self, keys: ConfigKeys) -> None:
        if keys.integer(_LAYOUT_KEY, _GROUP_SIZE) != _GROUP_SIZE:
            raise keys.refuse(
                _LAYOUT_KEY, f"is not what the published class computes, which is {_GROUP_SIZE}"
            )
        without = {key: value for key, value in keys.values.items() if key != _LAYOUT_KEY}
        super().refuse(ConfigKeys(without, keys.path))

    def read_layers(
        self, keys: ConfigKeys, model: ModelConfig, window_convention: WindowConvention | None
    ) -> None:
        super().read_layers(keys, model, window_convention)
        model.gla.gate = GateKind.full_rank
        model.spiking = SpikingConfig(list(_ROUNDED), GateEncoding.once, _K, queries=True)
        model.quantization = QuantizationConfig(
            list(_ROUNDED), _GROUP_SIZE, keys_and_values=True, stored_scales=True
        )

    def unsupported(self, model: ModelConfig) -> list[str]:
        """All that its class computes otherwise: it reads none of what config.json says beyond its keys."""
        plain = [part for part in super().unsupported(model) if not part.startswith("stored scales")]
        if plain:
            return plain
        quantization, spiking = model.quantization, model.spiking
        names = ", ".join(each.value for each in _ROUNDED)
        parts = [
            (f"INT8 weights elsewhere than in {names}", set(quantization.projections) != set(_ROUNDED)),
            (f"groups of {quantization.group_size} weights", quantization.group_size != _GROUP_SIZE),
            (f"spikes elsewhere than in front of {names}", set(spiking.projections) != set(_ROUNDED)),
            (f"spikes with k {spiking.k:g}", spiking.k != _K),
            ("queries without spikes", not spiking.queries),
            ("float keys and values", not quantization.keys_and_values),
            (f"a {model.gla.gate.value} gate", model.gla.gate is not GateKind.full_rank),
            (
                f"inputs that {_GROUP_SIZE} does not divide",
                any(
                    width % _GROUP_SIZE
                    for width in (
                        model.hidden_size,
                        model.ffn_hidden_size,
                        model.kv_channels * model.num_attention_heads,
                    )
                ),
            ),
        ]
        return [words for words, is_so in parts if is_so] + self.published_class_lacks(model)

    def int8_group(self, weight: Weight, model: ModelConfig) -> int | None:
        """Of every projection, those that are used as they are included."""
        if weight.projection is None or model.quantization.stored_scales:
            return None
        return _GROUP_SIZE

    def scale_names(self, names: list[str]) -> list[str]:
        return [_scale_name(name) for name in names]

    def keys(self, model: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
        """Under names that the published class does not look at, what the code in the folder reads."""
        keys = super().keys(model, config)
        keys.pop("quantization_config", None)
        linears = {
            name: projection in _ROUNDED
            for projection, names in LINEARS.items()
            for name in names
            if "." not in name and name != "g_proj"
        }
        settings = {
            "quant_method": QUANT_METHOD,
            "layout": "published",
            "group_size": _GROUP_SIZE,
            "linears": linears,
            "keys_and_values": True,
        }
        return {**keys, **spiking_keys(model), "w8aspike": settings}

    def published_class_lacks(self, model: ModelConfig) -> list[str]:
        return [words for words in super().published_class_lacks(model) if words != "full-rank gate"]

    def _not_published(self, model: ModelConfig) -> str:
        return ""  # unsupported() holds that against what it does


W8ASPIKE = PublishedW8ASpikeFormat()
