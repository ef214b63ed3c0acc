"""Arguments of what ``spikingbrain-convert`` does with checkpoints as they are, such as ``reshard``.

Imports torch only after they have been understood.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.model_checks import check_model
from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.plugins import add_plugins_argument
from spikingbrain_train.conversion.hf_folder import read_weight_map
from spikingbrain_train.conversion.output_folder import check_output_folder
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.planning.parallel_checks import check_split
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.storage.checkpoint_folder import (
    LATEST_ITERATION_FILE,
    is_complete,
    iteration_folder,
    iterations,
)
from spikingbrain_train.storage.checkpoint_paths import holds_checkpoint, resolve_checkpoint
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE, load_config_json

_RESHARD_DESCRIPTION = """\
Lay a Megatron checkpoint out as the ranks of another topology would write it: the same numbers, bit for bit,
in other chunks and files. Optimizer, schedule and random generators come along.

No run needs this to go on: every checkpoint loads at any topology. It is worth it where many ranks load
often (each then reads its own part and nothing else; --dry-run says how many bytes that saves), to put the
files of hundreds of ranks into a few, to leave the optimizer out before a checkpoint is handed on
(--weights-only), and to give a checkpoint without manifest.json one.
"""

_RESHARD_EXAMPLES = """\
examples:
  # what it would give, without writing anything
  spikingbrain-convert reshard --checkpoint outputs/cpt --output resharded/checkpoints --tp 2 --pp 2 --dry-run

  # for 2 tensor x 2 pipeline ranks; a run goes on from it with output_dir=resharded
  spikingbrain-convert reshard --checkpoint outputs/cpt --output resharded/checkpoints --tp 2 --pp 2

  # the newest checkpoint of a run with experts for 8 expert-parallel ranks, weights alone
  spikingbrain-convert reshard --checkpoint outputs/cpt_76b --output handed_on --ep 8 --weights-only
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

_AVERAGE_DESCRIPTION = """\
Write the average of several checkpoints of one architecture: plain, weighted, or an exponential moving
average. All of them Megatron checkpoints or all Hugging Face folders; the result has the same form, and says
what it was made of. Of Megatron checkpoints it holds weights alone: start a stage from it with
checkpoint.load, evaluate or export it. Tensors stream, whatever the number of checkpoints.
"""

_AVERAGE_EXAMPLES = """\
examples:
  # the newest five checkpoints of a run
  spikingbrain-convert average --checkpoints outputs/cpt --last 5 --output averaged

  # an exponential moving average over them: the newest counts 0.2, the one before 0.16, ...
  spikingbrain-convert average --checkpoints outputs/cpt --last 5 --ema 0.8 --output averaged

  # two exports, one of which counts three times as much
  spikingbrain-convert average --checkpoints exports/math exports/code --weights 3 1 --output exports/both
"""

DIFFERENT = 1
"""Exit code of ``diff`` for checkpoints that are not the same, as diff(1) has it."""


def add_commands(commands: Any) -> None:
    """Add them to the subcommands of ``spikingbrain-convert``."""
    _add_reshard(commands)
    _add_diff(commands)
    _add_average(commands)


def _add_diff(commands: Any) -> None:
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
        type=_not_negative,
        metavar="R",
        help="relative difference up to which numbers count as equal, whatever their format; without it "
        "formats and all bits have to agree",
    )
    parser.add_argument(
        "--top", type=_number, default=20, metavar="N", help="list the N worst tensors (20); 0 lists all"
    )
    parser.add_argument(
        "--training",
        action="store_true",
        help="compare optimizer and other state of training too, of two Megatron checkpoints",
    )
    parser.add_argument("--json", action="store_true", help="print all tensors as JSON, for programs")
    add_plugins_argument(parser)
    parser.set_defaults(handler=_diff)


def _add_average(commands: Any) -> None:
    parser = commands.add_parser(
        "average",
        help="write the average of several checkpoints",
        description=_AVERAGE_DESCRIPTION,
        epilog=_AVERAGE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="two or more checkpoints, the oldest first, or one run folder with --last",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--last", type=_degree, metavar="N", help="the newest N checkpoints of the one run in --checkpoints"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--weights",
        type=_not_negative,
        nargs="+",
        metavar="W",
        help="what each checkpoint counts, in their order; their sum need not be 1",
    )
    kind.add_argument(
        "--ema",
        type=float,
        metavar="DECAY",
        help="exponential moving average from the first checkpoint on: s = DECAY s + (1 - DECAY) x",
    )
    _add_output_flags(parser, "average")
    parser.set_defaults(handler=_average)


def _add_reshard(commands: Any) -> None:
    parser = commands.add_parser(
        "reshard",
        help="lay a Megatron checkpoint out for other ranks",
        description=_RESHARD_DESCRIPTION,
        epilog=_RESHARD_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="run folder or its checkpoints (the newest is taken), or one iter_* folder",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to make; iter_* in it holds the shards",
    )
    degree: dict[str, Any] = {"type": _degree, "default": 1, "metavar": "N"}
    parser.add_argument(
        "--tp",
        "--tensor-model-parallel-size",
        help="ranks that split every matrix and the vocabulary (1)",
        **degree,
    )
    parser.add_argument(
        "--pp",
        "--pipeline-model-parallel-size",
        help="pipeline stages; must divide the number of layers (1)",
        **degree,
    )
    parser.add_argument(
        "--ep",
        "--expert-model-parallel-size",
        help="ranks over which routed experts are spread (1)",
        **degree,
    )
    parser.add_argument(
        "--etp",
        "--expert-tensor-parallel-size",
        type=_degree,
        metavar="N",
        help="ranks that split every routed expert (as --tp)",
    )
    parser.add_argument(
        "--weights-only", action="store_true", help="leave optimizer and other training state out"
    )
    _add_output_flags(parser, "copy")
    parser.set_defaults(handler=_reshard)


def _add_output_flags(parser: argparse.ArgumentParser, verb: str) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result in --output")
    parser.add_argument(
        "--allow-damaged-weights",
        action="store_true",
        help=f"{verb} tensors that hold NaN or infinities, instead of refusing them",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything but the values and print the report without writing",
    )
    add_plugins_argument(parser)


def _degree(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of ranks; write a whole number from 1 on")
    return int(text)


def _not_negative(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return number


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def _diff(arguments: argparse.Namespace) -> str:
    for path, setting in ((arguments.a, "A"), (arguments.b, "B")):
        _check_folder(path, setting)
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


def _average(arguments: argparse.Namespace) -> str:
    folders = _members(arguments.checkpoints, arguments.last)
    number, weights, decay = len(folders), arguments.weights, arguments.ema
    if weights is not None and len(weights) != number:
        raise ConfigurationError(
            f"--weights lists {len(weights)} numbers for {number} checkpoints; give one for each"
        )
    if weights is not None and sum(weights) == 0:
        raise ConfigurationError("--weights are all 0; give at least one checkpoint a weight above 0")
    if decay is not None and not 0 < decay < 1:
        raise ConfigurationError(f"--ema {decay} must be between 0 and 1, such as 0.9")
    for folder in folders:
        _check_folder(folder, "--checkpoints")
        check_output_folder(
            arguments.output,
            source=folder,
            overwrite=arguments.overwrite,
            marker="",
            needed_bytes=0,
            dry_run=True,
        )
    with activity("importing torch"):
        from spikingbrain_train.conversion.average import (
            average_checkpoints,
            decaying_shares,
            equal_shares,
        )

    shares, did = equal_shares(number), "average"
    if weights is not None:
        shares, did = [weight / sum(weights) for weight in weights], "weighted average"
    elif decay is not None:
        shares, did = decaying_shares(number, decay), f"exponential moving average (decay {decay:g})"
    return average_checkpoints(
        folders,
        arguments.output,
        shares,
        did=did,
        overwrite=arguments.overwrite,
        allow_damaged_weights=arguments.allow_damaged_weights,
        dry_run=arguments.dry_run,
        progress=True,
    ).table()


def _members(folders: list[Path], last: int | None) -> list[Path]:
    """The checkpoints that ``--checkpoints`` and ``--last`` mean, the oldest first."""
    if last is None:
        if len(folders) == 1:
            raise ConfigurationError(
                f"--checkpoints {folders[0]} is one checkpoint; name two or more, or add --last N to average "
                "the newest N of a run"
            )
        return folders
    if len(folders) > 1:
        raise ConfigurationError(
            f"--last {last} takes checkpoints of one run, but --checkpoints names {len(folders)} folders; "
            "leave --last out"
        )
    newest = resolve_checkpoint(folders[0], "--checkpoints")
    beside = [iteration_folder(newest.parent, number) for number in iterations(newest.parent)]
    found = [folder for folder in beside if is_complete(folder)][-last:]
    if not 2 <= last <= len(found):
        raise ConfigurationError(
            f"--last {last} must be 2 to {len(found)}, the number of complete checkpoints in "
            f"{newest.parent}; change it, or name checkpoints one by one"
        )
    return found


def _check_folder(path: Path, setting: str) -> None:
    """That a folder holds a checkpoint of either form, before torch is there."""
    if (path / CONFIG_FILE).is_file():
        load_config_json(path)
        read_weight_map(path)
        return
    if path.is_dir() and not holds_checkpoint(path):
        raise CheckpointError(
            f"{setting}={path} is neither a Hugging Face folder, which has a config.json, nor a Megatron "
            "checkpoint: an iter_* folder, a folder with one in it, or the output_dir of a run"
        )
    read_stored_model(resolve_checkpoint(path, setting))


def _reshard(arguments: argparse.Namespace) -> str:
    folder = resolve_checkpoint(arguments.checkpoint)
    model = read_stored_model(folder)
    check_model(model)
    parallel = ParallelConfig(
        tensor_model_parallel_size=arguments.tp,
        pipeline_model_parallel_size=arguments.pp,
        expert_model_parallel_size=arguments.ep,
        expert_tensor_parallel_size=arguments.etp,
        sequence_parallel=arguments.tp > 1,  # what experts need beside tensor parallelism
    )
    check_split(model, parallel)
    check_output_folder(
        arguments.output,
        source=folder,
        overwrite=arguments.overwrite,
        marker=LATEST_ITERATION_FILE,
        needed_bytes=0,
        dry_run=True,
    )
    with activity("importing torch"):
        from spikingbrain_train.conversion.reshard import reshard_checkpoint

    return reshard_checkpoint(
        folder,
        arguments.output,
        parallel,
        weights_only=arguments.weights_only,
        overwrite=arguments.overwrite,
        allow_damaged_weights=arguments.allow_damaged_weights,
        dry_run=arguments.dry_run,
        progress=True,
    ).table()
