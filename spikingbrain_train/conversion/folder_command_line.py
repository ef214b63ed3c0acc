"""Arguments of ``reshard`` and ``average``, which make checkpoints of checkpoints.

Imports torch only after they have been understood.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.model_checks import check_model
from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.plugins import add_plugins_argument
from spikingbrain_train.conversion.flags import (
    add_checkpoint_flag,
    add_output_flag,
    add_workers_flag,
    add_writing_flags,
    check_folder,
    check_output,
    not_negative,
    positive_number,
)
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.parallel_checks import check_split
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.storage.checkpoint_folder import (
    LATEST_ITERATION_FILE,
    is_complete,
    iteration_folder,
    iterations,
)
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint

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


def add_reshard(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-convert``."""
    parser = commands.add_parser(
        "reshard",
        help="lay a Megatron checkpoint out for other ranks",
        description=_RESHARD_DESCRIPTION,
        epilog=_RESHARD_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint_flag(parser)
    add_output_flag(parser, "iter_* in it holds the shards")
    degree: dict[str, Any] = {"type": positive_number, "default": 1, "metavar": "N"}
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
        type=positive_number,
        metavar="N",
        help="ranks that split every routed expert (as --tp)",
    )
    parser.add_argument(
        "--weights-only", action="store_true", help="leave optimizer and other training state out"
    )
    add_writing_flags(parser, "copy")
    add_workers_flag(parser)
    add_plugins_argument(parser)
    parser.set_defaults(handler=_reshard)


def add_average(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-convert``."""
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
    add_output_flag(parser)
    parser.add_argument(
        "--last",
        type=positive_number,
        metavar="N",
        help="the newest N checkpoints of the one run in --checkpoints",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--weights",
        type=not_negative,
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
    add_writing_flags(parser, "average")
    add_plugins_argument(parser)
    parser.set_defaults(handler=_average)


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
    check_output(arguments, folder, LATEST_ITERATION_FILE)
    with activity("importing torch"):
        from spikingbrain_train.conversion.reshard import reshard_checkpoint

    return reshard_checkpoint(
        folder,
        arguments.output,
        parallel,
        weights_only=arguments.weights_only,
        overwrite=arguments.overwrite,
        allow_damaged_weights=arguments.allow_damaged_weights,
        workers=arguments.workers,
        dry_run=arguments.dry_run,
        progress=True,
    ).table()


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
        check_folder(folder, "--checkpoints")
        check_output(arguments, folder)
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
