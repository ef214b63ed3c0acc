"""Every Hugging Face format, and which one a config.json or a model is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.conversion.formats.dense import LLAMA, QWEN2, QWEN3
from spikingbrain_train.conversion.formats.gla_swa import GLA_SWA
from spikingbrain_train.conversion.formats.hf_format import HfFormat
from spikingbrain_train.conversion.window_convention import WindowConvention
from spikingbrain_train.errors import CheckpointError

FORMATS: list[HfFormat] = [LLAMA, QWEN2, QWEN3, GLA_SWA]
"""In the order in which an export tries them: what transformers has comes before what carries code. A plugin
appends its own."""


def format_of_config(values: dict[str, Any], path: Path) -> HfFormat:
    """The format of a config.json.

    Args:
        values: its contents.
        path: what messages call it.

    Raises:
        CheckpointError: it is of none of them.
    """
    by_architecture = {known.architecture: known for known in FORMATS}
    architectures = values.get("architectures") or [
        known.architecture for known in FORMATS if known.model_type == values.get("model_type")
    ]
    names = ", ".join(by_architecture)
    if (
        not isinstance(architectures, list)
        or len(architectures) != 1
        or not isinstance(architectures[0], str)
    ):
        raise CheckpointError(
            f"{path}: architectures must name one of {names}, got {json.dumps(architectures)}"
        )
    if architectures[0] not in by_architecture:
        raise CheckpointError(
            f"{path}: architecture {architectures[0]} is not supported; supported are {names}"
        )
    return by_architecture[architectures[0]]


def parse_hf_config(
    values: dict[str, Any], path: Path, window_convention: WindowConvention | None = None
) -> tuple[HfFormat, ModelConfig]:
    """Format and architecture of a config.json that is already loaded.

    Args:
        values: its contents.
        path: what messages call it.
        window_convention: how to read a window that the file leaves in doubt; None reads it as the published
            default code does.

    Raises:
        CheckpointError: it is malformed, or describes something that this model does not compute.
    """
    hf_format = format_of_config(values, path)
    return hf_format, hf_format.read(ConfigKeys(values, path), window_convention)


def format_of_model(model: ModelConfig) -> HfFormat:
    """The first format that holds exactly what ``model`` computes.

    Spikes do not count: they add no weights, and no format has a setting for them.

    Raises:
        CheckpointError: none does.
    """
    for hf_format in FORMATS:
        if not hf_format.unsupported(model):
            return hf_format
    held = " and ".join(dict.fromkeys(known.holds for known in FORMATS))
    raise CheckpointError(
        f"no Hugging Face format holds {' and '.join(unsupported(model))}; only {held} can be exported"
    )


def unsupported(model: ModelConfig) -> list[str]:
    """What of ``model`` the format that is nearest to it cannot hold, in words; empty if one holds it.

    The nearest has most of its kinds of mixers and feed-forwards, then fewest other obstacles.
    """
    nearest = min(FORMATS, key=lambda known: (known.num_unknown_kinds(model), len(known.unsupported(model))))
    return nearest.unsupported(model)
