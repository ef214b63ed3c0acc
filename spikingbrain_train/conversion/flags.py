"""Flags that several commands of ``spikingbrain-convert`` have, and what is checked of them before torch."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.config.plugins import add_plugins_argument
from spikingbrain_train.conversion.hf_folder import read_weight_map
from spikingbrain_train.conversion.output_folder import check_output_folder
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage.checkpoint_paths import holds_checkpoint, resolve_checkpoint
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE, load_config_json


def add_checkpoint_flag(parser: argparse.ArgumentParser) -> None:
    """``--checkpoint``: the Megatron checkpoint that is read."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="run folder or its checkpoints (the newest is taken), or one iter_* folder",
    )


def add_output_flag(parser: argparse.ArgumentParser, holds: str = "") -> None:
    """``--output``; ``holds`` says what lies where in it."""
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help=f"folder to make{holds and '; '}{holds}"
    )


def add_writing_flags(
    parser: argparse.ArgumentParser, verb: str, *, refuses: str = "NaN or infinities"
) -> None:
    """What whoever writes a folder can be told.

    Args:
        parser: of the command.
        verb: what it does with tensors.
        refuses: what of them it lets through only if asked.
    """
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result in --output")
    parser.add_argument(
        "--allow-damaged-weights",
        action="store_true",
        help=f"{verb} tensors that hold {refuses}, instead of refusing them",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything but the values and print the report, with what is known of disk, memory and "
        "time, without writing",
    )


def add_workers_flag(parser: argparse.ArgumentParser) -> None:
    """``--workers``, of work that comes in parts."""
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that read and write; the result does not depend on it (default: one a core, as far "
        "as memory allows and the model is worth it)",
    )


def add_json_flag(parser: argparse.ArgumentParser, what: str) -> None:
    """``--json``, of commands that only say something."""
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON, for programs")


def add_plugins_flag(parser: argparse.ArgumentParser) -> None:
    """``--plugins``, beside those that a recipe names."""
    add_plugins_argument(parser, "; a recipe names those that it needs itself, as plugins: [package.module]")


def check_output(arguments: argparse.Namespace, source: Path, marker: str = "") -> None:
    """Before torch is imported; what will be written is only known after it. Raises CheckpointError.

    Args:
        arguments: with ``output`` and ``overwrite``.
        source: the folder that is read.
        marker: file that only a folder made by the same command has; empty where it is not known yet.
    """
    check_output_folder(
        arguments.output,
        source=source,
        overwrite=arguments.overwrite,
        marker=marker,
        needed_bytes=0,
        dry_run=True,
    )


def check_folder(path: Path, setting: str) -> None:
    """That a folder holds a checkpoint of either form, before torch is imported. Raises CheckpointError.

    Args:
        path: the folder.
        setting: what named it, empty where the command takes nothing else.
    """
    if (path / CONFIG_FILE).is_file():
        load_config_json(path)
        read_weight_map(path)
        return
    if path.is_dir() and not holds_checkpoint(path):
        raise CheckpointError(
            f"{setting}{setting and '='}{path} is neither a Hugging Face folder, which has a config.json, "
            "nor a Megatron checkpoint: an iter_* folder, a folder with one in it, or the output_dir of a run"
        )
    read_stored_model(resolve_checkpoint(path, setting or "folder"))


def whole_number(text: str) -> int:
    """A number from 0 on, as argparse wants its types."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def positive_number(text: str) -> int:
    """A number of ranks, or of anything else of which there is one at least."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def not_negative(text: str) -> float:
    """A weight, or another amount."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return number
