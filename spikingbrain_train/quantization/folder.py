"""The folder of a quantised model: real INT8 tensors, and all that its source folder holds beside weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikingbrain_train.conversion.companion_files import find_companion_files
from spikingbrain_train.conversion.output_folder import complete_folder
from spikingbrain_train.conversion.safetensors_io import SafetensorsWriter, TensorSpec
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE

_MAX_SHARD_SIZE = 5 * 10**9


def write_folder(
    state: Mapping[str, Tensor],
    source: Path,
    output: Path,
    config: dict[str, Any],
    code: Mapping[str, str],
    finish: Callable[[Path, int], None],
) -> int:
    """Write a quantised model; the folder appears whole or not at all.

    Args:
        state: its tensors by their names.
        source: folder of the model before.
        output: to be made.
        config: its config.json.
        code: texts of its modelling files by their names.
        finish: told the folder, before it appears, and the bytes of its tensors; writes what else it holds.

    Returns:
        Bytes of its tensors.

    Raises:
        CheckpointError: it cannot be written.
    """
    # By falling size of their elements, as the writer wants them; names keep their order.
    names = sorted(state, key=lambda name: -state[name].element_size())
    specs = [TensorSpec(name, tuple(state[name].shape), _stored(name, state[name])) for name in names]
    specs.sort(key=lambda spec: -spec.dtype.itemsize)
    size = sum(spec.nbytes for spec in specs)
    with complete_folder(output, progress=True) as temporary:
        find_companion_files(source).copy_to(temporary)
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, text in code.items():
            (temporary / name).write_text(text, encoding="utf-8")
        with (
            activity("writing", size, "B") as done,
            SafetensorsWriter(temporary, specs, _MAX_SHARD_SIZE) as writer,
        ):
            for spec in specs:
                writer.write(spec.name, state[spec.name].cpu().to(spec.dtype))
                done.advance(spec.nbytes)
        finish(temporary, size)
    return size


def _stored(name: str, tensor: torch.Tensor) -> torch.dtype:
    """Scales have the digits of bfloat16 in whatever format they are computed."""
    return torch.bfloat16 if name.endswith(".weight_scale") else tensor.dtype
