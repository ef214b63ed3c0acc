"""config.json of a Hugging Face folder, as every tool reads it before torch and transformers are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spikingbrain_train.errors import CheckpointError

CONFIG_FILE = "config.json"


def load_config_json(folder: Path) -> dict[str, Any]:
    """The dictionary in ``folder/config.json``.

    Raises:
        CheckpointError: the folder or file is missing or cannot be read, or it is not a JSON object.
    """
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is not a folder; give the folder of a Hugging Face checkpoint"
            ) from None
        raise CheckpointError(
            f"{folder} is not a Hugging Face folder ({CONFIG_FILE} is missing); give one that "
            "spikingbrain-export or save_pretrained wrote"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({error}); copy it again from its source"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object; copy it again from its source")
    return values
