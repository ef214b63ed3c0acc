"""Adapters of peft folders beside a Hugging Face model, of which one is chosen for each text."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikingbrain_train.config.named_words import named_words
from spikingbrain_train.errors import CheckpointError, ConfigurationError, PlatformError, first_line
from spikingbrain_train.evaluation.routed_prompts import check_choices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FILE = "adapter_config.json"


def add_adapters_option(parser: Any) -> None:
    """``--adapters``, of a Hugging Face folder."""
    parser.add_argument(
        "--adapters",
        nargs="+",
        metavar="NAME=DIR",
        help="where --model is a Hugging Face folder: folders that peft or spikingbrain-bricks detach saved, "
        "by the names of the bricks; read with --routed",
    )


def routed_folders(arguments: argparse.Namespace, choices: Sequence[str | None]) -> dict[str, Path]:
    """Name -> folder, of ``--adapters`` beside the Hugging Face folder that ``--model`` names.

    Args:
        arguments: with ``--routed``, too.
        choices: of that; None without it.

    Raises:
        ConfigurationError: a word that does not fit, a choice that has no folder, or nothing is routed.
        CheckpointError: a folder is none of peft.
        PlatformError: the package peft is not installed.
    """
    words, routed = arguments.adapters, arguments.routed
    check_adapters_option(arguments)
    if routed is None:
        return {}
    if words is None:
        raise ConfigurationError(
            f"--routed computes each prompt with its own adapter, and --model {arguments.model} is a Hugging "
            "Face folder; name their folders with --adapters, or the checkpoint that spikingbrain-bricks "
            "attach or train has made with --model"
        )
    named = named_words("--adapters", words, "folder", "adapters/code", "give each adapter one folder")
    folders = {name: Path(folder) for name, folder in named.items()}
    for name, folder in folders.items():
        if not (folder / _FILE).is_file():
            raise CheckpointError(
                f"--adapters {name}={folder} has no {_FILE}; name a folder that peft or spikingbrain-bricks "
                "detach saved"
            )
    if importlib.util.find_spec("peft") is None:
        raise PlatformError(
            "--adapters needs the package peft: pip install peft, or attach the adapters to a checkpoint "
            "with spikingbrain-bricks attach"
        )
    check_choices(routed, [choice for choice in choices if choice is not None], folders, "--adapters")
    return folders


def check_adapters_option(arguments: argparse.Namespace) -> None:
    """Raises ConfigurationError: nothing would read it."""
    if arguments.adapters is not None and arguments.routed is None:
        raise ConfigurationError("--adapters is read with --routed only; name choices, or leave it out")


class FolderAdapters:
    """Adapters beside the weights of a model, which keeps its class: peft replaces modules inside it.

    Args:
        model: in evaluation mode.
        folders: name -> folder of peft, at least one.

    Raises:
        CheckpointError: an adapter does not fit the model.
    """

    def __init__(self, model: PreTrainedModel, folders: Mapping[str, Path]) -> None:
        import peft

        self._beside: Any = None
        for name, folder in folders.items():
            try:
                config = peft.PeftConfig.from_pretrained(str(folder))
                if self._beside is None:
                    self._beside = peft.PeftModel(model, config, adapter_name=name)
                found = self._beside.load_adapter(str(folder), adapter_name=name)
            except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
                raise self._unfit(name, folder, first_line(error)) from None
            if found.unexpected_keys:
                raise self._unfit(name, folder, f"it has no place for {found.unexpected_keys[0]}")
        self._beside.eval()

    def choose(self, choice: str | None) -> None:
        """Compute from here on with one adapter, the others off; None switches all of them off."""
        if choice is None:
            self._beside.base_model.disable_adapter_layers()
            return
        self._beside.base_model.enable_adapter_layers()
        self._beside.set_adapter(choice)
        self._beside.requires_grad_(False)

    def _unfit(self, name: str, folder: Path, why: str) -> CheckpointError:
        return CheckpointError(
            f"--adapters {name}={folder} does not fit the model ({why}); name the base that it was trained "
            "on with --model"
        )
