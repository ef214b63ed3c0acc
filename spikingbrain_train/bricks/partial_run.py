"""Training a part of a checkpoint while all else stays: what ``train`` and ``update`` have in common.

Both are a run of spikingbrain-train with settings of their own, behind which every other weight is held
against what it was.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.plugins import add_plugins_argument
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint

_OWN = ("model", "model.lora.trained", "model.moe.trained", "checkpoint.load", "output_dir")
"""Settings that both make."""


@dataclass(frozen=True)
class TrainedPart:
    """What of a checkpoint trains."""

    settings: dict[str, str]
    """Of the model, that say so."""
    words: str
    """Of it, with its verb: ``adapter code is``."""
    check: Callable[[Path, Path], int]
    """Holds all else of a result, the second, against what it was; returns the number of weights, and raises
    CheckpointError where one has changed."""


PartOf = Callable[[argparse.Namespace, ModelConfig], TrainedPart]
"""From the arguments and the model of the checkpoint; raises ConfigurationError where it does not fit."""


def add_partial_run(commands: Any, name: str, part_of: PartOf, **words: Any) -> argparse.ArgumentParser:
    """A subcommand that trains a part.

    Args:
        commands: the subcommands of ``spikingbrain-bricks``.
        name: of this one.
        part_of: what it trains.
        words: help, description and examples.

    Returns:
        Its parser, for flags of its own.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --rank is no --ranks
        **words,
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="Megatron checkpoint, or a run's folder"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="output_dir of the run")
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="processes that train (default: %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command that trains, and stop")
    parser.add_argument(
        "settings", nargs="*", metavar="SETTING", help="of the run, as spikingbrain-train takes them"
    )
    add_plugins_argument(parser)
    parser.set_defaults(prepare=_prepare, part_of=part_of, parallel=[])
    return parser


def adapter_part(name: str, settings: dict[str, str]) -> TrainedPart:
    """One adapter, with what else is said of the model's."""

    def check(before: Path, after: Path) -> int:
        from spikingbrain_train.bricks.changed_weights import check_only_adapter_changed

        return check_only_adapter_changed(before, after, name)

    return TrainedPart({**settings, "model.lora.trained": f"[{name}]"}, f"adapter {name} is", check)


def _part(arguments: argparse.Namespace) -> TrainedPart:
    stored = read_stored_model(resolve_checkpoint(arguments.checkpoint, "--checkpoint"))
    part: TrainedPart = arguments.part_of(arguments, stored)
    return part


def training_command(arguments: argparse.Namespace, part: TrainedPart) -> list[str]:
    """The words that train. Raises ConfigurationError: a setting is the command's own."""
    settings = [*arguments.settings, *arguments.parallel]  # where a command line looks like a layout's
    for word in settings:
        if (setting := word.lstrip("+").partition("=")[0]) in (*_OWN, *part.settings):
            raise ConfigurationError(f"{arguments.command} sets {setting} itself; leave {word} out")
    plugins = [f"plugins=[{','.join(arguments.plugins)}]"] if arguments.plugins else []
    return [
        *(sys.executable, "-m", "spikingbrain_train", "train"),
        *(("--nproc-per-node", str(arguments.ranks)) if arguments.ranks > 1 else ()),
        "model=from_checkpoint",
        f"checkpoint.load={_checkpoints(arguments.checkpoint)}",
        *(f"{setting}={value}" for setting, value in part.settings.items()),
        f"output_dir={arguments.output}",
        *plugins,
        *settings,
    ]


def _checkpoints(folder: Path) -> Path:
    """What checkpoint.load takes: of a run's folder that of its checkpoints."""
    inside = folder / CHECKPOINT_FOLDER
    return inside if inside.is_dir() else folder


def _prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    if arguments.world_size > 1:
        raise ConfigurationError(
            f"{arguments.command} starts the ranks that train itself; give --ranks in the place of "
            "--nproc-per-node"
        )
    if arguments.ranks < 1:
        raise ConfigurationError(f"--ranks is {arguments.ranks}; give at least 1")
    part = _part(arguments)
    command = training_command(arguments, part)

    def run() -> None:
        if arguments.dry_run:
            print(shlex.join(["spikingbrain-train", *command[4:]]))
            return
        _train(command)
        result = arguments.output / CHECKPOINT_FOLDER
        same = part.check(arguments.checkpoint, result)
        print(f"{result}: {part.words} trained; the other {same} weights are the same bit for bit")

    return run


def _train(command: Sequence[str]) -> None:
    """Raises SystemExit with the code of a run that failed, or was asked to stop and has saved."""
    code = subprocess.run(command).returncode
    if code:
        raise SystemExit(code)
