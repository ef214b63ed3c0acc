"""``spikingbrain-bricks train``: a new adapter beside a checkpoint, which stays as it is."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from spikingbrain_train.bricks.partial_run import TrainedPart, adapter_part, add_partial_run
from spikingbrain_train.config.lora import LoraConfig, LoraTarget
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.errors import ConfigurationError

_DESCRIPTION = """\
Train a new adapter beside a checkpoint, whose weights and adapters stay as they are bit for bit: a run of
spikingbrain-train with the settings that this takes, and a look at its result. Settings of the run (stage,
data, optimizer) are given as there. The same command goes on with a run that was stopped.
"""

_EXAMPLES = """\
examples:
  spikingbrain-bricks train --checkpoint outputs/base --adapter code --rank 16 --alpha 32 \\
      --target-modules q_proj,v_proj --output outputs/code \\
      stage=cpt stage.train_iters=200 'data.train=[data/code]'
"""


def add_train(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-bricks``."""
    parser = add_partial_run(
        commands,
        "train",
        _trained,
        help="train a new adapter while all else stays",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    parser.add_argument("--adapter", required=True, metavar="NAME", help="what the new one is called")
    fresh = LoraConfig()
    parser.add_argument(
        "--rank",
        type=int,
        default=fresh.ranks[0],
        metavar="N",
        help="rows of A, columns of B (default: %(default)s)",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        default=fresh.alphas[0],
        metavar="X",
        help="alpha / rank scales B A (default: %(default)s)",
    )
    parser.add_argument(
        "--target-modules",
        metavar="NAME,NAME",
        help="matrices that it stands beside (default: those of the checkpoint's adapters, else "
        f"{_joined(fresh.target_modules)})",
    )


def _trained(arguments: argparse.Namespace, model: ModelConfig) -> TrainedPart:
    stored = model.lora
    name, checkpoint = arguments.adapter, arguments.checkpoint
    if name in stored.names:
        raise ConfigurationError(
            f"--adapter {name} is an adapter of {checkpoint} already; train it again with "
            "spikingbrain-bricks update, or give the new one another name"
        )
    fresh = LoraConfig(names=[name], ranks=[arguments.rank], alphas=[arguments.alpha])
    if arguments.rank < 1 or not arguments.alpha > 0:
        raise ConfigurationError(
            f"--rank is {arguments.rank} and --alpha {arguments.alpha:g}; give a rank of at least 1 and an "
            "alpha above 0"
        )
    targets = _targets(arguments.target_modules, stored)
    fresh.target_modules = targets
    fresh.check("model.lora.")
    old, parts = stored.names, (stored, fresh)
    if old and set(targets) != set(stored.target_modules):
        raise ConfigurationError(
            f"--target-modules {_joined(targets)} are others than those of {', '.join(old)} in {checkpoint}, "
            f"{_joined(stored.target_modules)}; all adapters of a model stand beside the same matrices"
        )
    each = [(lora, one) for lora in parts for one in lora.names]
    settings = {
        "model.lora.names": f"[{','.join(one for _, one in each)}]",
        "model.lora.ranks": f"[{','.join(str(lora.rank(one)) for lora, one in each)}]",
        "model.lora.alphas": f"[{','.join(str(lora.alpha(one)) for lora, one in each)}]",
        "model.lora.weights": f"[{','.join(str(lora.weight(one)) for lora, one in each)}]",
        "model.lora.target_modules": f"[{_joined(targets)}]",
    }
    return adapter_part(name, settings)


def _targets(said: str | None, stored: LoraConfig) -> list[LoraTarget]:
    if said is None:
        return list(stored.target_modules) if stored.names else LoraConfig().target_modules
    unknown = [word for word in said.split(",") if word not in LoraTarget.__members__]
    if unknown:
        raise ConfigurationError(
            f"--target-modules has {', '.join(unknown)}, which is none of {_joined(LoraTarget)}; name some "
            "of these with commas between"
        )
    return [LoraTarget[word] for word in said.split(",")]


def _joined(targets: Iterable[LoraTarget]) -> str:
    return ",".join(target.value for target in targets)
