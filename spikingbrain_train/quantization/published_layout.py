"""A quantised model in the published W8ASpike layout: floats, and beside them the scales of their groups.

Weights are the numbers that the codes stand for, so that the published class, which rounds them to their
scales when it multiplies, finds these codes: the nearest whole number is theirs in float32, where code times
scale is exact, and in bfloat16, where it is off by a quarter of a scale at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spikingbrain_train.config.linear_transforms import GateEncoding, QuantizationConfig, SpikingConfig
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.w8aspike import W8ASPIKE
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.quantization.request import QuantizeRequest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_GROUP_SIZE = 128
_READS_FROM = "gla_swa"


def check_published(request: QuantizeRequest, model: ModelConfig, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the published class computes something else than is asked for.

    Args:
        request: what is asked for.
        model: that is quantised.
        config: config.json of its export.
    """
    if request.group_size != _GROUP_SIZE:
        asked = "row" if request.group_size is None else request.group_size
        raise CheckpointError(
            f"--format w8aspike has groups of {_GROUP_SIZE} weights, not --group-size {asked}; leave "
            f"--group-size or --format out"
        )
    parts = W8ASPIKE.unsupported(published_model(request, model))
    if not parts and config.get("model_type") != _READS_FROM:
        parts = [f"an export as {config.get('model_type')}"]
    if parts:
        raise CheckpointError(
            f"--format w8aspike cannot hold {' and '.join(parts)}; leave --format out for a folder of INT8 "
            f"tensors that can"
        )


def published_model(request: QuantizeRequest, model: ModelConfig) -> ModelConfig:
    """The model that the folder holds."""
    spiking = SpikingConfig(list(request.spike_projections), GateEncoding.once, request.k, queries=True)
    quantization = QuantizationConfig(
        list(request.projections), _GROUP_SIZE, keys_and_values=request.keys_and_values
    )
    return replace(model, spiking=spiking, quantization=quantization)


def published_config(
    request: QuantizeRequest, model: ModelConfig, source: Mapping[str, Any], number_format: str
) -> dict[str, Any]:
    """config.json of the folder.

    Args:
        request: what is asked for.
        model: that is quantised.
        source: config.json of the export that it was.
        number_format: of the weights, as config.json spells it.
    """
    return W8ASPIKE.config(published_model(request, model), dict(source), number_format)


def published_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Tensors by their published names: weights in the model's number format, scales in float32.

    Args:
        model: with INT8 linears.
    """
    from torch import nn

    from spikingbrain_train.hf.quantization_w8aspike import W8ASpikeLinear
    from spikingbrain_train.ops.int8_groups import group_scales

    tensors: dict[str, Tensor] = {
        name: x for name, x in model.state_dict().items() if not name.endswith(".weight_scale")
    }
    for name, module in model.named_modules():
        if isinstance(module, W8ASpikeLinear):
            scales: Tensor = module.weight_scale
            tensors[f"{name}.weight"] = module.float_weight()
        elif isinstance(module, nn.Linear) and name.endswith(".down_proj"):
            scales = group_scales(module.weight, _GROUP_SIZE)  # it has scales, and is used as it is
        else:
            continue
        tensors[f"{name}.weight_quantizer.scales"] = scales.float().unsqueeze(-1)
    return tensors
