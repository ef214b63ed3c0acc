"""Arguments of ``spikingbrain-bricks grow``, understood before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.bricks.checkpoint_flags import add_folders, check_no_settings
from spikingbrain_train.config.require import divisors
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint

_DESCRIPTION = """\
Add experts to every layer of experts of a checkpoint, without a change of its function: biases in front of
the router's softmax keep the new ones out, whatever the text. In training these go to zero, and the new
experts come in.
"""

_EXAMPLES = """\
examples:
  # four more, copies of the first four; they come in within 500 steps
  spikingbrain-bricks grow --checkpoint outputs/moe --add 4 --decay-iters 500 --output outputs/grown
  spikingbrain-train stage=cpt model=from_checkpoint checkpoint.load=outputs/grown ...
"""

STARTS = ("copies", "zeros")


def add_grow(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-bricks``."""
    parser = commands.add_parser(
        "grow",
        help="more experts, which change nothing until they are trained",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_folders(parser)
    parser.add_argument("--add", type=int, required=True, metavar="N", help="experts to add to every layer")
    parser.add_argument(
        "--copies-of",
        type=int,
        nargs="+",
        metavar="E",
        help="which experts the new ones are copies of, one for each (default: the first ones, in order)",
    )
    parser.add_argument(
        "--start",
        choices=STARTS,
        default="copies",
        help="what they compute at first: what the copied expert does, or nothing, by a down projection of "
        "zeros (default: %(default)s)",
    )
    parser.add_argument(
        "--decay-iters",
        type=int,
        default=1000,
        metavar="N",
        help="steps of training that let them in, model.moe.router_bias_decay_iters of the result (default: "
        "%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of noise on their router rows")
    parser.set_defaults(prepare=_prepare)


def _prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    check_no_settings(arguments)
    if arguments.add < 1:
        raise ConfigurationError(f"--add is {arguments.add}; add at least 1 expert")
    if arguments.decay_iters < 1:
        raise ConfigurationError(
            f"--decay-iters is {arguments.decay_iters}, which would never let new experts in; give at least 1"
        )
    copied = arguments.copies_of
    if copied is not None and len(copied) != arguments.add:
        raise ConfigurationError(
            f"--copies-of names {len(copied)} experts for --add {arguments.add}; name one for each new expert"
        )
    stored = read_stored_model(resolve_checkpoint(arguments.checkpoint, "--checkpoint"))

    def run() -> None:
        from spikingbrain_train.bricks.grow import Growth, grow

        number = stored.moe.num_experts
        growth = Growth(
            copied or [new % number for new in range(arguments.add)],
            silent=arguments.start == "zeros",
            decay_iters=arguments.decay_iters,
            seed=arguments.seed,
        )
        grown = grow(arguments.checkpoint, arguments.output, growth, overwrite=arguments.overwrite)
        lowest = min(float(each.min()) for each in grown.biases.values())
        more = grown.model.moe.num_experts
        print(
            f"{arguments.output}: {more} experts in the place of {number}; biases down to {lowest:.1f} keep "
            f"the new ones out until training has brought them to zero in {arguments.decay_iters} steps\n"
            f"parallel.expert_model_parallel_size may be {', '.join(map(str, divisors(more)))}"
        )

    return run
