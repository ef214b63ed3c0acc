"""Arguments of the adapters' subcommands of ``spikingbrain-bricks``, understood before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spikingbrain_train.config.plugins import add_plugins_argument
from spikingbrain_train.errors import ConfigurationError


def add_attach(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-bricks``."""
    parser = commands.add_parser(
        "attach", help="a checkpoint with adapters of peft folders beside its weights"
    )
    _add_folders(parser)
    parser.add_argument(
        "--adapters", type=Path, nargs="+", required=True, metavar="DIR", help="folders that peft saved"
    )
    parser.add_argument(
        "--names", nargs="+", required=True, metavar="NAME", help="what each is called in model.lora.names"
    )
    parser.set_defaults(prepare=_prepare_attach)


def add_merge(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-bricks``."""
    parser = commands.add_parser("merge", help="a checkpoint with adapters added up into its weights")
    _add_folders(parser)
    parser.add_argument(
        "--names", nargs="+", default=[], metavar="NAME", help="which adapters (default: all of them)"
    )
    parser.set_defaults(prepare=_prepare_merge)


def add_detach(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-bricks``."""
    parser = commands.add_parser("detach", help="an adapter of a checkpoint as a folder of peft")
    _add_folders(parser)
    parser.add_argument("--name", required=True, help="of the adapter, one of model.lora.names")
    parser.add_argument("--base", metavar="DIR", help="folder of the base's export, which peft shall load")
    parser.set_defaults(prepare=_prepare_detach)


def add_compose(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-bricks``."""
    parser = commands.add_parser("compose", help="several adapters of peft folders as one, by a weighted sum")
    parser.add_argument(
        "--adapters", type=Path, nargs="+", required=True, metavar="DIR", help="folders that peft saved"
    )
    parser.add_argument(
        "--weights", type=float, nargs="+", required=True, metavar="W", help="of each adapter in the sum"
    )
    parser.add_argument(
        "--rank",
        type=int,
        metavar="N",
        help="of the result, cut by a singular value decomposition, which says what it costs (default: the "
        "ranks together, where the sum is exact)",
    )
    _add_output(parser)
    parser.set_defaults(prepare=_prepare_compose, parallel=[])


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="Megatron checkpoint, or a run's folder"
    )
    _add_output(parser)
    add_plugins_argument(parser)
    parser.set_defaults(parallel=[])


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to be made")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result in --output")


def _check_no_settings(arguments: argparse.Namespace) -> None:
    if arguments.parallel:
        raise ConfigurationError(
            f"{arguments.command} reads and writes files in one process; leave {arguments.parallel[0]} out"
        )


def _prepare_attach(arguments: argparse.Namespace) -> Callable[[], None]:
    _check_no_settings(arguments)

    def run() -> None:
        from spikingbrain_train.bricks.adapters import attach

        model = attach(
            arguments.checkpoint,
            arguments.adapters,
            arguments.names,
            arguments.output,
            overwrite=arguments.overwrite,
        )
        print(f"{arguments.output}: adapters {', '.join(model.lora.names)}")

    return run


def _prepare_merge(arguments: argparse.Namespace) -> Callable[[], None]:
    _check_no_settings(arguments)

    def run() -> None:
        from spikingbrain_train.bricks.adapters import merge

        model = merge(arguments.checkpoint, arguments.output, arguments.names, overwrite=arguments.overwrite)
        print(
            f"{arguments.output}: adapters left beside the weights: {', '.join(model.lora.names) or 'none'}"
        )

    return run


def _prepare_detach(arguments: argparse.Namespace) -> Callable[[], None]:
    _check_no_settings(arguments)

    def run() -> None:
        from spikingbrain_train.bricks.adapters import detach

        detach(
            arguments.checkpoint,
            arguments.name,
            arguments.output,
            base=arguments.base,
            overwrite=arguments.overwrite,
        )
        print(f"{arguments.output}: adapter {arguments.name}")

    return run


def _prepare_compose(arguments: argparse.Namespace) -> Callable[[], None]:
    _check_no_settings(arguments)

    def run() -> None:
        from spikingbrain_train.bricks.compose import compose

        rank, lost = compose(
            arguments.adapters,
            arguments.weights,
            arguments.output,
            rank=arguments.rank,
            overwrite=arguments.overwrite,
        )
        how = "exact" if arguments.rank is None else f"{lost:.2%} of the norm of the sum is cut off"
        print(f"{arguments.output}: one adapter of rank {rank}, {how}")

    return run
