"""Flags of those subcommands of ``spikingbrain-bricks`` that make a checkpoint of another, in one process."""

from __future__ import annotations

import argparse
from pathlib import Path

from spikingbrain_train.config.plugins import add_plugins_argument
from spikingbrain_train.errors import ConfigurationError


def add_folders(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, --output and what belongs to them."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="Megatron checkpoint, or a run's folder"
    )
    add_output(parser)
    add_plugins_argument(parser)
    parser.set_defaults(parallel=[])


def add_output(parser: argparse.ArgumentParser) -> None:
    """--output and --overwrite."""
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to be made")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result in --output")


def check_no_settings(arguments: argparse.Namespace) -> None:
    """Nothing is said of ranks. Raises ConfigurationError."""
    if arguments.parallel:
        raise ConfigurationError(
            f"{arguments.command} reads and writes files in one process; leave {arguments.parallel[0]} out"
        )
