"""What the config.json of a Hugging Face folder says, held against the tensors that lie beside it."""

from __future__ import annotations

from pathlib import Path

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.hf_format import HfFormat
from spikingbrain_train.conversion.formats.registry import parse_hf_config
from spikingbrain_train.conversion.safetensors_io import SafetensorsReader
from spikingbrain_train.conversion.window_convention import WindowConvention
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE, load_config_json
from spikingbrain_train.storage.stored_layers import check_number_of_layers


def read_hf_config(
    folder: Path, window_convention: WindowConvention | None = None
) -> tuple[HfFormat, ModelConfig]:
    """Format and architecture of the checkpoint in ``folder``, from its config.json.

    Every setting that the model would compute differently is refused with a sentence; nothing is guessed.

    Args:
        folder: where config.json lies.
        window_convention: how to read a window that the file leaves in doubt; None reads it as the published
            default code does.

    Raises:
        CheckpointError: config.json is missing or malformed, or describes something that this model does not
            compute.
    """
    values = load_config_json(folder)
    setting = f"{folder / CONFIG_FILE}: num_hidden_layers"
    check_number_of_layers(setting, values.get("num_hidden_layers"), lambda: SafetensorsReader(folder).specs)
    return parse_hf_config(values, folder / CONFIG_FILE, window_convention)
