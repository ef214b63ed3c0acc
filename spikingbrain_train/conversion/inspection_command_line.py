"""Arguments of ``inspect`` and ``diff``, which say what checkpoints are, and write none.

Imports torch only after they have been understood.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from spikingbrain_train.config.plugins import add_plugins_argument
from spikingbrain_train.conversion.flags import (
    add_json_flag,
    add_plugins_flag,
    check_folder,
    not_negative,
    whole_number,
)
from spikingbrain_train.reporting.activity import activity

_INSPECT_DESCRIPTION = """\
Say what a folder holds, without reading weights: architecture, tensors and their sizes, files, and the way
back to its source: what it was imported from, the stages that trained it, the tokens that they read. A folder
of SpikingBrain2.0, which is not imported, is told tensor by tensor: what has a place here, and what has none.
"""

_DIFF_DESCRIPTION = """\
Say how two checkpoints differ: settings of the architecture, and tensor by tensor shape, number format,
max |a - b| and relative difference ||a - b|| / ||a||, the worst first. A and B may be Megatron checkpoints,
Hugging Face folders, or one of each, which are then compared under Hugging Face names. The padding of a
vocabulary does not count, nor do tensors that an export only repeats for readers of its format.

Ends like diff: 0 where they are the same, 1 where they differ, 2 where they cannot be compared.
"""

_DIFF_EXAMPLES = """\
examples:
  # has the export the numbers of the checkpoint?
  spikingbrain-convert diff outputs/cpt exports/my-hybrid

  # what have 1,000 steps changed most?
  spikingbrain-convert diff outputs/cpt/checkpoints/iter_0001000 outputs/cpt/checkpoints/iter_0002000 --top 30

  # for a script: the same up to bf16 rounding?
  spikingbrain-convert diff exports/fp32 exports/bf16 --tolerance 4e-3 --json > difference.json
"""

DIFFERENT = 1
"""Exit code of ``diff`` for checkpoints that are not the same, as diff(1) has it."""


def add_inspect(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-convert``."""
    parser = commands.add_parser(
        "inspect",
        help="say what a checkpoint folder holds, and whether it is complete",
        description=_INSPECT_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="Hugging Face folder, run folder, or one iter_* folder")
    parser.add_argument(
        "--tensors",
        nargs="?",
        const="*",
        metavar="PATTERN",
        help="list its tensors with shape, dtype and size; a pattern such as '*.layers.0.*' lists some",
    )
    add_json_flag(parser, "it")
    add_plugins_flag(parser)
    parser.set_defaults(handler=_inspect)


def add_diff(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-convert``."""
    parser = commands.add_parser(
        "diff",
        help="say how two checkpoints differ, tensor by tensor",
        description=_DIFF_DESCRIPTION,
        epilog=_DIFF_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=Path, metavar="A", help="Hugging Face folder, run folder, or iter_* folder")
    parser.add_argument("b", type=Path, metavar="B", help="another one")
    parser.add_argument(
        "--tolerance",
        type=not_negative,
        metavar="R",
        help="relative difference up to which numbers count as equal, whatever their format; without it "
        "formats and all bits have to agree",
    )
    parser.add_argument(
        "--top", type=whole_number, default=20, metavar="N", help="list the N worst tensors (20); 0 lists all"
    )
    parser.add_argument(
        "--training",
        action="store_true",
        help="compare optimizer and other state of training too, of two Megatron checkpoints",
    )
    add_json_flag(parser, "all tensors")
    add_plugins_argument(parser)
    parser.set_defaults(handler=_diff)


def _inspect(arguments: argparse.Namespace) -> str:
    check_folder(arguments.folder, "")
    with activity("importing torch"):
        from spikingbrain_train.conversion.inspect_checkpoint import inspect_checkpoint

    with activity(f"reading {arguments.folder}"):
        found = inspect_checkpoint(arguments.folder)
    if arguments.json:
        return json.dumps(found.values(), indent=2)
    return found.text() if arguments.tensors is None else found.table(arguments.tensors)


def _diff(arguments: argparse.Namespace) -> str:
    for path, setting in ((arguments.a, "A"), (arguments.b, "B")):
        check_folder(path, setting)
    with activity("importing torch"):
        from spikingbrain_train.conversion.difference import diff_checkpoints

    found = diff_checkpoints(
        arguments.a,
        arguments.b,
        tolerance=arguments.tolerance,
        with_training=arguments.training,
        progress=True,
    )
    text = json.dumps(found.values(), indent=2) if arguments.json else found.text(arguments.top or None)
    if not found.differ:
        return text
    print(text)
    sys.stdout.flush()
    raise SystemExit(DIFFERENT)
