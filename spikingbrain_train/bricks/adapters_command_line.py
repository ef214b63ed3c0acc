"""Arguments of the adapters' subcommands of ``spikingbrain-bricks``, understood before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spikingbrain_train.bricks.checkpoint_flags import add_folders, add_output, check_no_settings


def add_attach(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-bricks``."""
    parser = commands.add_parser(
        "attach", help="a checkpoint with adapters of peft folders beside its weights"
    )
    add_folders(parser)
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
    add_folders(parser)
    parser.add_argument(
        "--names", nargs="+", default=[], metavar="NAME", help="which adapters (default: all of them)"
    )
    parser.set_defaults(prepare=_prepare_merge)


def add_detach(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-bricks``."""
    parser = commands.add_parser("detach", help="an adapter of a checkpoint as a folder of peft")
    add_folders(parser)
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
    add_output(parser)
    parser.set_defaults(prepare=_prepare_compose, parallel=[])


def _prepare_attach(arguments: argparse.Namespace) -> Callable[[], None]:
    check_no_settings(arguments)

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
    check_no_settings(arguments)

    def run() -> None:
        from spikingbrain_train.bricks.adapters import merge

        model = merge(arguments.checkpoint, arguments.output, arguments.names, overwrite=arguments.overwrite)
        print(
            f"{arguments.output}: adapters left beside the weights: {', '.join(model.lora.names) or 'none'}"
        )

    return run


def _prepare_detach(arguments: argparse.Namespace) -> Callable[[], None]:
    check_no_settings(arguments)

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
    check_no_settings(arguments)

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
