"""What a Hugging Face folder's own files may make transformers do: nothing but read this folder.

A config.json can name code, kernels and quantisers that transformers fetches or runs. Code of the folder
itself runs with the user's leave only; everything else is refused here, or left out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.evaluation.model_folder import untrusted_code
from spikingbrain_train.hf import QUANT_METHOD
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE, load_config_json
from spikingbrain_train.storage.stored_layers import check_number_of_layers

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_config.json"
_QUANTISERS = ("quantization_config", "compression_config")
_LOCAL_ATTENTION = (None, "eager", "sdpa")
"""Of torch itself. Any other name may be that of a kernel on the Hugging Face hub, or be replaced by one."""


def check_folder(folder: Path, trust_remote_code: bool) -> None:
    """Refuse a folder that would run or fetch what the user gave no leave for.

    Raises:
        ConfigurationError: it brings code that may not run.
        CheckpointError: it is no model folder, is quantised or an adapter, names code elsewhere, or claims
            more layers than it has.
    """
    config = load_config_json(folder)
    references = [str(value) for value in _values_of("auto_map", config)]
    if references and config.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
        raise untrusted_code(folder)
    if trust_remote_code and any("--" in reference for reference in references):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: auto_map names code of another repository ({', '.join(references)}); "
            "only code in the folder itself is run: copy it there and name it without --"
        )
    for key in _QUANTISERS:
        is_local = key == _QUANTISERS[0] and (is_w8aspike(config) or is_bitnet(config))
        checked = {**config, key: None} if is_local else config
        if any(value is not None for value in _values_of(key, checked)):
            raise CheckpointError(
                f"{folder / CONFIG_FILE} has a {key}, whose method may fetch code to run; use the "
                "unquantised model"
            )
    if (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER_FILE}) beside its model; merge it into the weights, or "
            "remove the file to load the model without it"
        )
    setting = f"{folder / CONFIG_FILE}: num_hidden_layers"
    for claimed in _values_of("num_hidden_layers", config):
        check_number_of_layers(setting, claimed, lambda: _tensor_names(folder))


def is_w8aspike(config: dict[str, Any]) -> bool:
    """Whether config.json asks for INT8 weights and spikes of an export's own code, which fetches nothing."""
    asked = config.get("quantization_config")
    return isinstance(asked, dict) and asked.get("quant_method") == QUANT_METHOD and "auto_map" in config


def is_bitnet(config: dict[str, Any]) -> bool:
    """Whether config.json asks for transformers' own ternary linears, which fetch nothing."""
    asked = config.get("quantization_config")
    return isinstance(asked, dict) and asked.get("quant_method") == "bitnet"


def keep_to_local_kernels(config: PretrainedConfig) -> None:
    """Let the model choose its attention and experts itself where its config.json names a kernel of the hub.

    transformers loads kernels such as ``"_attn_implementation": "owner/kernel"`` without asking for leave.
    """
    for part in _with_parts(config):
        wanted = part._attn_implementation
        if wanted not in _LOCAL_ATTENTION:
            logger.warning(
                "config.json asks for the attention %r, which is not loaded; the model's own is taken", wanted
            )
            part._attn_implementation = None
        if getattr(part, "_experts_implementation", None) is not None:
            part._experts_implementation = None


def _with_parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A configuration and those inside it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _with_parts(value)


def _values_of(key: str, config: object) -> Iterator[Any]:
    """What ``key`` holds in ``config`` and in the dictionaries inside it; of a dictionary, its own values."""
    if not isinstance(config, dict):
        return
    for name, value in config.items():
        if name != key:
            yield from _values_of(key, value)
        elif isinstance(value, dict):
            yield from value.values() or [value]
        else:
            yield value


def _tensor_names(folder: Path) -> Iterator[str]:
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                yield from file.keys()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is not a complete safetensors file ({error}); copy it again"
            ) from error
