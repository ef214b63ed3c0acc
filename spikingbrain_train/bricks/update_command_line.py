"""``spikingbrain-bricks update``: an adapter or some experts are trained again, and nothing else changes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.layers import feed_forwards_of
from spikingbrain_train.architecture.moe import MOE
from spikingbrain_train.bricks.partial_run import TrainedPart, adapter_part, add_partial_run
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.require import require
from spikingbrain_train.errors import ConfigurationError

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


def add_update(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-bricks``."""
    parser = add_partial_run(
        commands,
        "update",
        _trained,
        help="train one adapter, or some experts, again while all else stays",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--adapter", metavar="NAME", help="one of model.lora.names")
    what.add_argument(
        "--experts", metavar="N,N", help="their numbers in every layer of experts, counted from 0"
    )


def _trained(arguments: argparse.Namespace, stored: ModelConfig) -> TrainedPart:
    """What trains. Raises ConfigurationError where the checkpoint lacks it."""
    if arguments.experts is not None:
        return _expert_part(_experts(arguments, stored))
    names = stored.lora.names
    if arguments.adapter not in names:
        has = ", ".join(names) or "none"
        raise ConfigurationError(
            f"--adapter {arguments.adapter} is no adapter of {arguments.checkpoint}, which has {has}"
        )
    return adapter_part(arguments.adapter, {})


def _expert_part(numbers: list[int]) -> TrainedPart:
    def check(before: Path, after: Path) -> int:
        from spikingbrain_train.bricks.changed_weights import check_only_experts_changed

        return check_only_experts_changed(before, after, numbers)

    trained = f"[{','.join(map(str, numbers))}]"
    return TrainedPart({"model.moe.trained": trained}, f"experts {', '.join(map(str, numbers))} are", check)


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
