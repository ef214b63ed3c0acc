"""Where the weights of a Hugging Face folder lie: its index of shards. Read before torch is there."""

from __future__ import annotations

import json
from pathlib import Path

from spikingbrain_train.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read_weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> shard file name; empty for a checkpoint in one file.

    Raises:
        CheckpointError: there are no safetensors, or their index is malformed or names a missing file.
    """
    if (folder / SINGLE_FILE).exists():  # transformers prefers it over an index, too
        return {}
    path = folder / INDEX_FILE
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; save the model with "
            "save_pretrained(..., safe_serialization=True) first"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is malformed ({error!r}); copy it again from its source") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map lists no tensors; copy it again from its source")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or file_name in (".", "..", "") or set(file_name) & set("/\\\0"):
            raise CheckpointError(
                f"{path}: the shard of {name} must be a file name inside the folder, got {file_name!r}"
            )
    for file_name in dict.fromkeys(weight_map.values()):
        if not (folder / file_name).is_file():
            raise CheckpointError(f"{folder / file_name} is missing; copy the whole folder from its source")
    return weight_map
