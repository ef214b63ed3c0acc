"""``spikingbrain-bricks update``: one adapter of a checkpoint is trained again, and nothing else changes."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.config.plugins import add_plugins_argument
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint

_DESCRIPTION = """\
Train one adapter of a checkpoint again, beside the others and the base, which stay as they are bit for bit: a
run of spikingbrain-train with the settings that this takes, and a look at its result. Settings of the run
(stage, data, optimizer) are given as there. The same command goes on with a run that was stopped.
"""

_EXAMPLES = """\
examples:
  spikingbrain-bricks update --checkpoint outputs/adapted --adapter code --output outputs/updated \\
      stage=cpt stage.train_iters=200 'data.train=[data/code]'
"""

_OWN = ("model", "model.lora.trained", "checkpoint.load", "output_dir")
"""Settings that the command itself makes."""


def add_update(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-bricks``."""
    parser = commands.add_parser(
        "update",
        help="train one adapter again while all else stays",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="Megatron checkpoint, or a run's folder"
    )
    parser.add_argument("--adapter", required=True, metavar="NAME", help="one of model.lora.names")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="output_dir of the run")
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="processes that train (default: %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command that trains, and stop")
    parser.add_argument(
        "settings", nargs="*", metavar="SETTING", help="of the run, as spikingbrain-train takes them"
    )
    add_plugins_argument(parser)
    parser.set_defaults(prepare=_prepare, parallel=[])


def training_command(arguments: argparse.Namespace) -> list[str]:
    """The words that train.

    Raises:
        ConfigurationError: the checkpoint has no such adapter, or a setting is the command's own.
        CheckpointError: it cannot be read.
    """
    if arguments.world_size > 1:
        raise ConfigurationError(
            "update starts the ranks that train itself; give --ranks in the place of --nproc-per-node"
        )
    if arguments.ranks < 1:
        raise ConfigurationError(f"--ranks is {arguments.ranks}; give at least 1")
    checkpoint = resolve_checkpoint(arguments.checkpoint, "--checkpoint")
    names = read_stored_model(checkpoint).lora.names
    if arguments.adapter not in names:
        has = ", ".join(names) or "none"
        raise ConfigurationError(
            f"--adapter {arguments.adapter} is no adapter of {arguments.checkpoint}, which has {has}"
        )
    settings = [*arguments.settings, *arguments.parallel]  # where a command line looks like a layout's
    for word in settings:
        if (name := word.lstrip("+").partition("=")[0]) in _OWN:
            raise ConfigurationError(f"update sets {name} itself; leave {word} out")
    plugins = [f"plugins=[{','.join(arguments.plugins)}]"] if arguments.plugins else []
    return [
        *(sys.executable, "-m", "spikingbrain_train", "train"),
        *(("--nproc-per-node", str(arguments.ranks)) if arguments.ranks > 1 else ()),
        "model=from_checkpoint",
        f"checkpoint.load={_checkpoints(arguments.checkpoint)}",
        f"model.lora.trained=[{arguments.adapter}]",
        f"output_dir={arguments.output}",
        *plugins,
        *settings,
    ]


def _checkpoints(folder: Path) -> Path:
    """What checkpoint.load takes: of a run's folder that of its checkpoints."""
    inside = folder / CHECKPOINT_FOLDER
    return inside if inside.is_dir() else folder


def _prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    command = training_command(arguments)

    def run() -> None:
        if arguments.dry_run:
            print(shlex.join(["spikingbrain-train", *command[4:]]))
            return
        _train(command)
        from spikingbrain_train.bricks.changed_weights import check_only_adapter_changed

        result = arguments.output / CHECKPOINT_FOLDER
        same = check_only_adapter_changed(arguments.checkpoint, result, arguments.adapter)
        print(
            f"{result}: adapter {arguments.adapter} is trained; the other {same} weights are the same bit "
            "for bit"
        )

    return run


def _train(command: Sequence[str]) -> None:
    """Raises SystemExit with the code of a run that failed, or was asked to stop and has saved."""
    code = subprocess.run(command).returncode
    if code:
        raise SystemExit(code)
