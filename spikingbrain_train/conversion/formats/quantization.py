"""INT8 weights in config.json: ``quantization_config`` of formats whose code multiplies by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from spikingbrain_train.architecture.quantization import INT8_WEIGHTS
from spikingbrain_train.architecture.spikes import SPIKES
from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.spiking import spiking_keys
from spikingbrain_train.hf import QUANT_METHOD

LINEARS: Mapping[Projection, Mapping[str, int]] = {
    Projection.qkv: {"q_proj": 0, "k_proj": 0, "v_proj": 0},
    Projection.gate: {"gk_proj.0": 0, "gk_proj.1": 1, "gk_proj": 0, "g_proj": 0},
    Projection.attention_output: {"o_proj": 0},
    Projection.mlp_fc1: {"gate_proj": 0, "up_proj": 0},
    Projection.mlp_fc2: {"down_proj": 0},
}
"""Linears of exports by what they project, and the position of their matrix there."""
SPIKES_IN, FLOAT_IN = "spikes", "float"
"""What linears make of their input: see hf/quantization_w8aspike.py."""


def int8_group(weight: Weight, model: ModelConfig) -> int | None:
    """How many neighbours of a weight share a scale where a model multiplies by INT8 numbers."""
    if weight.projection is None or model.quantization.stored_scales:
        return None
    return model.quantization.group_size if INT8_WEIGHTS.applies(model, *weight.projection) else None


def quantization_keys(
    model: ModelConfig, names: Mapping[Projection, Mapping[str, int]] = LINEARS
) -> dict[str, Any]:
    """``quantization_config`` and ``spiking`` of a model; nothing of either that it does not have.

    Spikes in front of INT8 weights are those of ``quantization_config``.

    Args:
        model: the network.
        names: of linears, as :data:`LINEARS` has them.
    """
    quantized = model.quantization.projections
    if not quantized and not model.quantization.keys_and_values:
        return spiking_keys(model)
    linears = {
        name: SPIKES_IN if SPIKES.applies(model, projection, matrix) else FLOAT_IN
        for projection in quantized
        for name, matrix in names.get(projection, {}).items()
    }
    settings = {
        "quant_method": QUANT_METHOD,
        "group_size": model.quantization.group_size,
        "linears": linears,
        "k": model.spiking.k,
        "embeddings": False,
        "keys_and_values": model.quantization.keys_and_values,
    }
    left = [each for each in model.spiking.projections if each not in quantized]
    others = replace(model, spiking=replace(model.spiking, projections=left))
    return {"quantization_config": settings, **spiking_keys(others)}
