"""A stored run_config.yaml given back: ``spikingbrain-train --config FILE [name=value ...]``.

Every checkpoint holds the config of its run, all settings written out. Given back it is the last entry of the
defaults list, where experiments stand, so that single settings override it; a group=choice takes the place of
its whole section.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from spikingbrain_train.config.load import load_run_config
from spikingbrain_train.config.model_from_checkpoint import complete_model
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.storage.checkpoint_folder import (
    CHECKPOINT_FOLDER,
    RUN_CONFIG_FILE,
    iteration_folder,
    newest_iteration,
)

_CHOICE = "stored_run_config"


def stored_config_file(arguments: Sequence[str]) -> Path | None:
    """The stored config that a command line names, None where it names none. Raises ConfigurationError."""
    path, _ = _named_file(arguments)
    return _config_in(path) if path is not None and path.is_dir() else path


def with_stored_config(arguments: Sequence[str], groups: Collection[str]) -> list[str]:
    """The command line for Hydra, which finds the named config under ``experiment``.

    Hydra's own way to name a file, ``--config-dir FOLDER --config-name run_config``, is taken for the same.

    Args:
        arguments: of the command line.
        groups: names of the config groups.

    Returns:
        The arguments as they are where they name no stored config.

    Raises:
        ConfigurationError: the flag has no file, or others or an experiment stand beside it.
        CheckpointError: the file is missing, or is not the config of a run.
    """
    path, rest = _named_file(arguments)
    if path is None:
        return rest
    if path.is_dir():
        path = _config_in(path)
    run = load_run_config(path, complete_model)
    if run.parallel.expert_tensor_parallel_size == run.parallel.tensor_model_parallel_size:
        # Earlier releases stored what its null stands for, which a run without experts may not say.
        run.parallel.expert_tensor_parallel_size = None
    values: Any = OmegaConf.to_container(OmegaConf.structured(run), enum_to_str=True)
    chosen = {argument.partition("=")[0].lstrip("+") for argument in rest if "=" in argument}
    if "experiment" in chosen:
        raise ConfigurationError(
            f"--config {path} is a whole run, which leaves no place for an experiment; leave one of them out"
        )
    for group in chosen & set(groups):
        values.pop(group, None)
    ConfigStore.instance().store(group="experiment", name=_CHOICE, package="_global_", node=values)
    return [*rest, f"experiment={_CHOICE}"]


def _config_in(folder: Path) -> Path:
    """The config in the folder of an iteration, or in that of a run: of its newest checkpoint."""
    newest = newest_iteration(folder / CHECKPOINT_FOLDER)
    if newest is not None:
        folder = iteration_folder(folder / CHECKPOINT_FOLDER, newest)
    return folder / RUN_CONFIG_FILE


def _named_file(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-name", "-cn")
    try:
        flags, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ConfigurationError(
            f"{error.argument_name} needs a value: --config <run_config.yaml>"
        ) from error
    if flags.config is not None:
        if flags.config_dir is not None or flags.config_name is not None:
            raise ConfigurationError(
                f"--config {flags.config} names a whole run; leave --config-dir and --config-name out"
            )
        return Path(flags.config), rest
    if flags.config_dir is not None and flags.config_name is not None:
        name = flags.config_name.removesuffix(".yaml")
        return Path(flags.config_dir) / f"{name}.yaml", rest
    return None, list(arguments)
