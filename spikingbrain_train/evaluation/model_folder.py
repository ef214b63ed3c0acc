"""What can be said of a model's folder, and of a file to write, before torch and transformers are there."""

from __future__ import annotations

from pathlib import Path

from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.hf import CODES
from spikingbrain_train.planning.file_checks import check_output_folder
from spikingbrain_train.storage.checkpoint_folder import LATEST_ITERATION_FILE
from spikingbrain_train.storage.checkpoint_paths import holds_checkpoint
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE, load_config_json


def is_megatron_checkpoint(folder: Path, flag: str = "--model") -> bool:
    """Whether ``flag`` names a Megatron checkpoint; else it is a Hugging Face folder.

    Raises:
        CheckpointError: it is neither.
    """
    if (folder / CONFIG_FILE).exists() or any(folder.glob("*.safetensors")):
        return False
    if holds_checkpoint(folder):
        return True
    if not folder.is_dir():
        raise CheckpointError(f"{flag} {folder} is not a folder; name that of a model or a checkpoint")
    raise CheckpointError(
        f"{flag} {folder} is neither a Hugging Face folder, which has a {CONFIG_FILE}, nor a Megatron "
        f"checkpoint, which is a folder with {LATEST_ITERATION_FILE}, an iter_* folder in it or the "
        f"output_dir of a run; name one of them"
    )


def untrusted_code(folder: Path) -> ConfigurationError:
    """The error for a folder that brings code which it may not run."""
    files = ", ".join(sorted(path.name for path in folder.glob("*.py")))
    return ConfigurationError(
        f"{folder} brings its own modelling code ({files}); read it, and add --trust-remote-code "
        "if it may run here"
    )


def check_model_folder(folder: Path, trust_remote_code: bool) -> None:
    """Refuse what transformers cannot load anyway; :func:`~.folder_checks.check_folder` knows the rest.

    Raises:
        CheckpointError: config.json is missing or no JSON object, or there are no safetensors.
        ConfigurationError: the folder is an export whose code it may not run.
    """
    config = load_config_json(folder)
    # Which architectures need no code is only known to transformers, but ours is not among them.
    ours = any(config.get("architectures") == code.architectures for code in CODES)
    if ours and "auto_map" in config and not trust_remote_code:
        raise untrusted_code(folder)
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} holds no weights in safetensors; copy the missing files, or write them with "
            "save_pretrained"
        )


def check_output_file(path: Path | None, flag: str) -> None:
    """``path`` can be written. Raises ConfigurationError, naming ``flag``."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigurationError(f"{flag} {path} is a folder; name a file")
    check_output_folder(path.parent, flag)
