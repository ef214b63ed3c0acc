"""Prompts for which ``spikingbrain-bricks route`` has chosen adapters, without torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from spikingbrain_train.errors import ConfigurationError, DataError, first_line


def add_routed_option(parser: Any, what: str) -> None:
    """``--routed``.

    Args:
        parser: for it.
        what: is done with the file, e.g. "go on from".
    """
    parser.add_argument(
        "--routed",
        type=Path,
        metavar="FILE",
        help=f"{what} the prompts of a file that spikingbrain-bricks route --output wrote, each computed "
        "with the adapter that was chosen for it, alone",
    )


def take_prompts(arguments: argparse.Namespace) -> list[str | None]:
    """The adapter of each prompt of ``arguments.prompt``, which those of ``--routed`` become.

    Raises:
        DataError: as :func:`routed_prompts`.
    """
    if arguments.routed is None:
        return [None] * len(arguments.prompt)
    arguments.prompt, choices = routed_prompts(arguments.routed)
    return list(choices)


def routed_prompts(path: Path) -> tuple[list[str], list[str]]:
    """Prompts of a file, and the adapter of each.

    Raises:
        DataError: the file is none of ``route``, or has no prompts.
    """
    try:
        routed = json.loads(path.read_text(encoding="utf-8"))["prompts"]
        prompts, choices = [str(each["prompt"]) for each in routed], [str(each["chosen"]) for each in routed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"--routed {path} is no result of spikingbrain-bricks route ({first_line(error)}); name the file "
            "that its --output wrote"
        ) from None
    if not choices:
        raise DataError(
            f"--routed {path} has no prompts; give spikingbrain-bricks route some with --prompt or --prompts"
        )
    return prompts, choices


def check_choices(path: Path, choices: Sequence[str], there: Collection[str], where: str) -> None:
    """Every adapter that was chosen is there.

    Args:
        path: of ``--routed``.
        choices: in it.
        there: adapters that can be chosen.
        where: these are, e.g. "the adapters of outputs/attached".

    Raises:
        ConfigurationError: one is not there.
    """
    missing = list(dict.fromkeys(each for each in choices if each not in there))
    if missing:
        raise ConfigurationError(
            f"--routed {path} has chosen {', '.join(missing)}, but {where} are "
            f"{', '.join(there) or 'none'}; name bricks as adapters are named, or attach them"
        )
