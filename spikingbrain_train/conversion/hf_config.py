"""What the config.json of a Hugging Face folder says, held against the tensors that lie beside it."""

from __future__ import annotations

from pathlib import Path

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.conversion.formats.gla_swa import GLA_SWA
from spikingbrain_train.conversion.formats.hf_format import HfFormat
from spikingbrain_train.conversion.formats.registry import format_of_config, parse_hf_config
from spikingbrain_train.conversion.formats.w8aspike import W8ASPIKE
from spikingbrain_train.conversion.safetensors_io import SafetensorsReader, has_stored_scales
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
    path = folder / CONFIG_FILE
    if format_of_config(values, path) is GLA_SWA and has_stored_scales(SafetensorsReader(folder)):
        # Its config.json is that of the plain form: tensors alone tell.
        return W8ASPIKE, W8ASPIKE.read(ConfigKeys(values, path), window_convention)
    return parse_hf_config(values, path, window_convention)
