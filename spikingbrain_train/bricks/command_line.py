"""spikingbrain-bricks: which subcommands there are; the flags of each stand in a file of its own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from spikingbrain_train.bricks.abilities_command_line import add_abilities
from spikingbrain_train.bricks.adapters_command_line import (
    add_attach,
    add_compose,
    add_detach,
    add_merge,
)
from spikingbrain_train.bricks.grow_command_line import add_grow
from spikingbrain_train.bricks.moefy_command_line import add_moefy
from spikingbrain_train.bricks.neurons_command_line import add_neurons
from spikingbrain_train.bricks.predictors_command_line import add_predictors
from spikingbrain_train.bricks.route_command_line import add_route
from spikingbrain_train.bricks.train_command_line import add_train
from spikingbrain_train.bricks.update_command_line import add_update
from spikingbrain_train.config.command_line import called_as
from spikingbrain_train.evaluation.inference_command_line import Elsewhere, run_inference

_DESCRIPTION = """\
A model as bricks that can be looked at, left out and put together (configurable foundation models,
arXiv 2409.02877).
"""


def bricks_parser() -> argparse.ArgumentParser:
    """The subcommands and flags of spikingbrain-bricks.

    Each ``add_<subcommand>`` sets ``prepare``: from the parsed arguments to the function that does the rest,
    having refused what can be refused without torch.
    """
    parser = argparse.ArgumentParser(
        prog=called_as(),
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Each subcommand explains itself: {called_as()} neurons --help",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        add_neurons,
        add_abilities,
        add_predictors,
        add_moefy,
        add_train,
        add_attach,
        add_merge,
        add_detach,
        add_compose,
        add_route,
        add_grow,
        add_update,
    ):
        add(commands)
    return parser


def bricks(arguments: Sequence[str] | None = None, *, elsewhere: Elsewhere | None = None) -> None:
    """spikingbrain-bricks."""
    run_inference(bricks_parser(), _prepare, arguments, elsewhere)


def _prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    action: Callable[[], None] = arguments.prepare(arguments)
    return action
