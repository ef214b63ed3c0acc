"""Spikes in config.json: the key ``spiking`` of the formats whose modelling code computes them."""

from __future__ import annotations

from typing import Any

from spikingbrain_train.config.linear_transforms import GateEncoding, Projection, SpikingConfig
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys

_KEY = "spiking"


def spiking_keys(model: ModelConfig) -> dict[str, Any]:
    """The key and its value; nothing for a model without spikes."""
    spiking = model.spiking
    if not spiking.projections and not spiking.queries:
        return {}
    values = {
        "projections": [projection.value for projection in spiking.projections],
        "k": spiking.k,
        "gate_encoding": spiking.gate_encoding.value,
    }
    return {_KEY: values | ({"queries": True} if spiking.queries else {})}


def read_spiking(keys: ConfigKeys) -> SpikingConfig:
    """Spikes of the model that a config.json describes.

    Raises:
        CheckpointError: it asks for spikes that this model does not have.
    """
    value = keys.values.get(_KEY)
    if not value:
        return SpikingConfig()
    if not isinstance(value, dict):
        raise keys.refuse(_KEY, "must hold projections, k and gate_encoding")
    settings = ConfigKeys(value, keys.path)
    projections, encoding = value.get("projections"), value.get("gate_encoding", GateEncoding.once.value)
    known = [projection.value for projection in Projection]
    queries = settings.boolean("queries", False)
    if (
        not isinstance(projections, list)
        or not (projections or queries)
        or any(name not in known for name in projections)
    ):
        raise settings.refuse("projections", f"must list some of {', '.join(known)}")
    if encoding not in [each.value for each in GateEncoding]:
        raise settings.refuse("gate_encoding", "must be once or each_matrix")
    return SpikingConfig(
        [Projection(name) for name in projections],
        GateEncoding(encoding),
        settings.number("k"),
        queries=queries,
    )
