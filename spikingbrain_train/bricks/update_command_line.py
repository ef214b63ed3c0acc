"""``spikingbrain-bricks update``: an adapter or some experts are trained again, and nothing else changes."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.layers import feed_forwards_of
from spikingbrain_train.architecture.moe import MOE
from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.plugins import add_plugins_argument
from spikingbrain_train.config.require import require
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint

_DESCRIPTION = """\
Train one adapter of a checkpoint again, or some experts of every layer that has experts, beside all else,
which stays as it is bit for bit: a run of spikingbrain-train with the settings that this takes, and a look at
its result. Settings of the run (stage, data, optimizer) are given as there. The same command goes on with a
run that was stopped.
"""

_EXAMPLES = """\
examples:
  spikingbrain-bricks update --checkpoint outputs/adapted --adapter code --output outputs/updated \\
      stage=cpt stage.train_iters=200 'data.train=[data/code]'
  spikingbrain-bricks update --checkpoint outputs/moe --experts 3,7 --output outputs/updated \\
      stage=cpt stage.train_iters=200 'data.train=[data/code]'
"""

_OWN = ("model", "model.lora.trained", "model.moe.trained", "checkpoint.load", "output_dir")
"""Settings that the command itself makes."""


def add_update(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-bricks``."""
    parser = commands.add_parser(
        "update",
        help="train one adapter, or some experts, again while all else stays",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="Megatron checkpoint, or a run's folder"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--adapter", metavar="NAME", help="one of model.lora.names")
    what.add_argument(
        "--experts", metavar="N,N", help="their numbers in every layer of experts, counted from 0"
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
    parser.set_defaults(prepare=_prepare, parallel=[])


def training_command(arguments: argparse.Namespace) -> list[str]:
    """The words that train.

    Raises:
        ConfigurationError: the checkpoint has no such adapter or experts, or a setting is the command's own.
        CheckpointError: it cannot be read.
    """
    if arguments.world_size > 1:
        raise ConfigurationError(
            "update starts the ranks that train itself; give --ranks in the place of --nproc-per-node"
        )
    if arguments.ranks < 1:
        raise ConfigurationError(f"--ranks is {arguments.ranks}; give at least 1")
    checkpoint = resolve_checkpoint(arguments.checkpoint, "--checkpoint")
    trained = _trained(arguments, read_stored_model(checkpoint))
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
        trained,
        f"output_dir={arguments.output}",
        *plugins,
        *settings,
    ]


def _trained(arguments: argparse.Namespace, stored: ModelConfig) -> str:
    """The setting that says what trains. Raises ConfigurationError where the checkpoint lacks it."""
    if arguments.experts is not None:
        return f"model.moe.trained=[{','.join(map(str, _experts(arguments, stored)))}]"
    names = stored.lora.names
    if arguments.adapter not in names:
        has = ", ".join(names) or "none"
        raise ConfigurationError(
            f"--adapter {arguments.adapter} is no adapter of {arguments.checkpoint}, which has {has}"
        )
    return f"model.lora.trained=[{arguments.adapter}]"


def _experts(arguments: argparse.Namespace, stored: ModelConfig) -> list[int]:
    """Numbers of the experts that are to train. Raises ConfigurationError where the checkpoint lacks one."""
    words = arguments.experts.split(",")
    require(
        all(word.isdecimal() for word in words),
        f"--experts {arguments.experts} is no list of numbers; give them with commas between, e.g. 3,7",
    )
    require(
        MOE in feed_forwards_of(stored),
        f"--experts {arguments.experts} names experts, but {arguments.checkpoint} has no layers of experts; "
        "cut its feed-forwards with spikingbrain-bricks moefy, or upcycle them with spikingbrain-convert",
    )
    numbers = sorted({int(word) for word in words})
    require(
        numbers[-1] < stored.moe.num_experts,
        f"--experts {arguments.experts} names expert {numbers[-1]}, but those of {arguments.checkpoint} are "
        f"0 to {stored.moe.num_experts - 1}; name some of those",
    )
    require(
        not stored.lora.names,
        f"{arguments.checkpoint} has adapters ({', '.join(stored.lora.names)}), beside which no experts "
        "train; merge them first with spikingbrain-bricks merge",
    )
    return numbers


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
        from spikingbrain_train.bricks.changed_weights import (
            check_only_adapter_changed,
            check_only_experts_changed,
        )

        result = arguments.output / CHECKPOINT_FOLDER
        if arguments.experts is None:
            what = f"adapter {arguments.adapter} is"
            same = check_only_adapter_changed(arguments.checkpoint, result, arguments.adapter)
        else:
            stored = read_stored_model(resolve_checkpoint(arguments.checkpoint, "--checkpoint"))
            numbers = _experts(arguments, stored)
            what = f"experts {', '.join(map(str, numbers))} are"
            same = check_only_experts_changed(arguments.checkpoint, result, numbers)
        print(f"{result}: {what} trained; the other {same} weights are the same bit for bit")

    return run


def _train(command: Sequence[str]) -> None:
    """Raises SystemExit with the code of a run that failed, or was asked to stop and has saved."""
    code = subprocess.run(command).returncode
    if code:
        raise SystemExit(code)
