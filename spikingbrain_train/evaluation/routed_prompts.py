"""Prompts for which ``spikingbrain-bricks route`` has chosen adapters, without torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.linear_transforms import choices_of
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.errors import ConfigurationError, DataError, first_line


def add_routed_option(parser: Any) -> None:
    """``--routed``, in the place of ``--prompt``."""
    parser.add_argument(
        "--routed",
        type=Path,
        metavar="FILE",
        help="or the prompts of a file that spikingbrain-bricks route --output wrote, each computed with the "
        "adapter of the checkpoint that was chosen for it, alone",
    )


def take_prompts(arguments: argparse.Namespace) -> list[str | None]:
    """The adapter of each prompt of ``arguments.prompt``, which those of ``--routed`` become.

    Raises:
        DataError: the file is none of ``route``, or has no prompts.
    """
    path = arguments.routed
    if path is None:
        return [None] * len(arguments.prompt)
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))["prompts"]
        arguments.prompt = [str(each["prompt"]) for each in prompts]
        choices: list[str | None] = [str(each["chosen"]) for each in prompts]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"--routed {path} is no result of spikingbrain-bricks route ({first_line(error)}); name the file "
            "that its --output wrote"
        ) from None
    if not choices:
        raise DataError(
            f"--routed {path} has no prompts; give spikingbrain-bricks route some with --prompt or --prompts"
        )
    return choices


def check_choices(path: Path, model: ModelConfig, choices: Sequence[str], checkpoint: Path) -> None:
    """Every adapter that was chosen is beside the weights. Raises ConfigurationError."""
    there = choices_of(model)
    missing = list(dict.fromkeys(each for each in choices if each not in there))
    if missing:
        raise ConfigurationError(
            f"--routed {path} has chosen {', '.join(missing)}, but the adapters of {checkpoint} are "
            f"{', '.join(there) or 'none'}; name bricks as adapters are named, or attach them"
        )
