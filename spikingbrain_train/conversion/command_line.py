"""spikingbrain-convert and spikingbrain-export: which commands there are, and how they start."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from spikingbrain_train.config.command_line import called_as, user_errors
from spikingbrain_train.config.plugins import load_plugins, plugins_of
from spikingbrain_train.conversion.export_command_line import add_export, export_parser
from spikingbrain_train.conversion.folder_command_line import add_average, add_reshard
from spikingbrain_train.conversion.import_command_line import add_import
from spikingbrain_train.conversion.inspection_command_line import add_diff, add_inspect

_DESCRIPTION = """\
Convert checkpoints between Hugging Face and Megatron, swapping sequence mixers on the way in.
Runs on CPUs, tensor by tensor: a machine that can store a checkpoint can convert it. What was killed is gone
on with by the same command, to the same bytes.
"""


def convert_checkpoint(arguments: Sequence[str] | None = None) -> None:
    """spikingbrain-convert: ``import``, ``export``, and what is done with checkpoints as they are."""
    _run(convert_parser(), arguments)


def convert_parser() -> argparse.ArgumentParser:
    """The commands and flags of ``spikingbrain-convert``."""
    parser = argparse.ArgumentParser(
        prog=called_as(),
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Each command explains itself: {called_as()} import --help",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_import, add_export, add_inspect, add_reshard, add_diff, add_average):
        add(commands)
    return parser


def export(arguments: Sequence[str] | None = None) -> None:
    """spikingbrain-export: the ``export`` command on its own."""
    _run(export_parser(), arguments)


def _run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> None:
    with user_errors():
        parsed = parser.parse_args(arguments)
        load_plugins(plugins_of(vars(parsed), "the command line"))
        print(parsed.handler(parsed))
        sys.stdout.flush()
