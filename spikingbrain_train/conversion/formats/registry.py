"""Every Hugging Face format, and which one a config.json or a model is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.bitnet import BITNET
from spikingbrain_train.conversion.formats.bitnet_masters import BITNET_MASTERS
from spikingbrain_train.conversion.formats.bitnet_packed import BITNET_BITLINEAR, BITNET_PACKED
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.conversion.formats.dense import LLAMA, MISTRAL, QWEN2, QWEN3
from spikingbrain_train.conversion.formats.gguf import GGUF, GGUF_Q2_0
from spikingbrain_train.conversion.formats.gla_swa import GLA_SWA
from spikingbrain_train.conversion.formats.hf_format import HfFormat
from spikingbrain_train.conversion.formats.mamba import FALCON_MAMBA, MAMBA
from spikingbrain_train.conversion.formats.outside_kinds import how_to_bring_code, without_code
from spikingbrain_train.conversion.formats.qwen3_moe import QWEN3_MOE
from spikingbrain_train.conversion.formats.sparse_llama import SPARSE_LLAMA
from spikingbrain_train.conversion.formats.spikingbrain import SPIKINGBRAIN
from spikingbrain_train.conversion.formats.spikingbrain_packed import SPIKINGBRAIN_PACKED
from spikingbrain_train.conversion.formats.sse_swa_moba import SpikingBrain2, is_spikingbrain2
from spikingbrain_train.conversion.formats.w8aspike import W8ASPIKE
from spikingbrain_train.conversion.window_convention import WindowConvention
from spikingbrain_train.errors import CheckpointError, ConfigurationError

FORMATS: list[HfFormat] = [
    *(LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, MAMBA, FALCON_MAMBA, BITNET_MASTERS),
    *(
        SPARSE_LLAMA,
        GLA_SWA,
        SPIKINGBRAIN,
        W8ASPIKE,
        SPIKINGBRAIN_PACKED,
        BITNET,
        BITNET_PACKED,
        BITNET_BITLINEAR,
        GGUF,
        GGUF_Q2_0,
    ),
]
"""In the order in which an export tries them: what transformers has, what others read, then our own, then the
form with stored scales, the packed ones and llama.cpp's, which are asked for. A plugin appends its own."""


def names_of_formats() -> list[str]:
    """What ``--format`` calls them."""
    return [known.name or known.model_type for known in FORMATS]


def format_of_config(values: dict[str, Any], path: Path) -> HfFormat:
    """The format of a config.json.

    Args:
        values: its contents.
        path: what messages call it.

    Raises:
        CheckpointError: it is of none of them; of SpikingBrain2.0, whose layers it names, as well.
    """
    if is_spikingbrain2(values):
        raise SpikingBrain2.read(values, path).refusal(path)
    # The first of an architecture; tensors alone tell the other (conversion/hf_config.py).
    read = [known for known in FORMATS if known.reads(values)]
    read.sort(key=lambda known: not known.is_packed(values))  # what says that it is packed is read as that
    by_architecture = {known.architecture: known for known in reversed(read)}
    architectures = values.get("architectures") or [
        known.architecture
        for known in by_architecture.values()
        if known.model_type == values.get("model_type")
    ]
    names = ", ".join(dict.fromkeys(known.architecture for known in read))
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


def packed_format(values: dict[str, Any]) -> HfFormat | None:
    """The format whose packed ternary weights lie beside a config.json; None where none do."""
    return next((known for known in FORMATS if known.is_packed(values)), None)


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


def format_of_model(
    model: ModelConfig, wanted: str | None = None, source: dict[str, Any] | None = None
) -> HfFormat:
    """The format in which ``model`` is exported.

    Unless one is asked for, it is the first that computes exactly the same: that has a place for every weight
    and does to projections what the model does (spikes). What one that is asked for leaves out of the latter
    is in :meth:`~.hf_format.HfFormat.leaves_out`.

    Args:
        model: the network.
        wanted: its name in :func:`names_of_formats`; None chooses.
        source: config.json of the model that it was made of, whose family comes first: what a Mistral without
            windows computes, Llama's class does, too.

    Raises:
        ConfigurationError: no format is called ``wanted``.
        CheckpointError: none, or not the one asked for, has a place for every weight; or none that was not
            asked for does to projections what the model does.
    """
    if wanted is not None:
        hf_format = dict(zip(names_of_formats(), FORMATS, strict=True)).get(wanted)
        if hf_format is None:
            names = ", ".join(names_of_formats())
            raise ConfigurationError(f"--format {wanted} is no Hugging Face format here; known are {names}")
        if parts := hf_format.unsupported(model):
            raise CheckpointError(
                f"--format {wanted} cannot hold {' and '.join(parts)}; leave --format out to export to one "
                f"that can"
            )
        return hf_format
    holding = [known for known in FORMATS if not known.is_for_inference and not known.unsupported(model)]
    family = (source or {}).get("architectures")
    lacking = without_code(model)
    if holding:
        best = min(holding, key=lambda known: (len(known.leaves_out(model)), [known.architecture] != family))
        left_out = best.leaves_out(model)
        if left_out:
            names = " and ".join(kind.name for kind in left_out)
            raise CheckpointError(
                f"no export computes what {names} does to projections; {how_to_bring_code(left_out)}, or "
                f"write --format {best.name or best.model_type} to export without"
            )
        return best
    if lacking:
        raise CheckpointError(
            f"no Hugging Face format holds {' and '.join(unsupported(model))}; {how_to_bring_code(lacking)}"
        )
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
