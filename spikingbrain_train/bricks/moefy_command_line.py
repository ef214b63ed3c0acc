"""Arguments of ``spikingbrain-bricks moefy``, understood before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.architecture.model_checks import check_model
from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.bricks.open_neurons import neurons_of_checkpoint
from spikingbrain_train.config.model import ModelConfig, MoEConfig, RouterWeights
from spikingbrain_train.config.require import divisors, either
from spikingbrain_train.conversion.flags import check_output
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.checkpoint_request import CheckpointRequest
from spikingbrain_train.evaluation.inference_command_line import add_inference_options
from spikingbrain_train.evaluation.model_folder import is_megatron_checkpoint
from spikingbrain_train.evaluation.reading_command_line import (
    add_text_options,
    check_text_options,
    reading_of,
)
from spikingbrain_train.storage.checkpoint_folder import LATEST_ITERATION_FILE
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint

PARTITIONS = ("clusters", "coactivation", "random")
ROUTERS = ("fitted", "mlp", "centres")

_DESCRIPTION = """\
Cut the dense feed-forwards of a Megatron checkpoint into experts of equally many neurons (MoEfication,
arXiv 2110.01786): an ordinary checkpoint of a mixture of experts, of which every token uses k. With k as
large as the number of experts it computes what the dense model does. Half of the text's windows fit the
routers, on the other half cross entropy is measured: whole, with these experts and this router, with those
that give most at each token (oracle), and with experts cut at random.
"""

_EXAMPLES = """\
examples:
  # 48 experts of 32 neurons, 14 of them (29 %) for every token; then train on
  spikingbrain-bricks moefy --model outputs/dense --text docs.jsonl --experts 48 --topk 14 \\
      --output outputs/moe
  spikingbrain-train stage=cpt model=from_checkpoint checkpoint.load=outputs/moe ...

In --output beside the checkpoint: moefy.json, what was measured, and moefy.png where that is more than one
number of experts.
"""


def add_moefy(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-bricks``."""
    parser = commands.add_parser(
        "moefy",
        help="cut dense feed-forwards into experts, of which every token uses some",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_inference_options(parser, output_file=False)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to make; iter_0000000 in it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result in --output")
    add_text_options(parser)
    parser.add_argument(
        "--experts", type=int, required=True, metavar="N", help="experts that every feed-forward is cut into"
    )
    parser.add_argument(
        "--topk", type=int, required=True, metavar="K", help="experts that every token is sent to"
    )
    parser.add_argument(
        "--partition",
        choices=PARTITIONS,
        default="clusters",
        help="which neurons make an expert: balanced k-means on their gate and up rows, a balanced partition "
        "of those that work at the same tokens, or any (default: %(default)s)",
    )
    parser.add_argument(
        "--router",
        choices=ROUTERS,
        default="fitted",
        help="a linear fitted to what experts give on the text, one with a hidden layer trained to the same "
        "(mlp), or the centres of their gate rows (default: %(default)s)",
    )
    parser.add_argument(
        "--router-hidden-size",
        type=int,
        metavar="N",
        help="channels of the hidden layer of --router mlp (default: the hidden size of the model)",
    )
    parser.add_argument(
        "--measure",
        type=int,
        nargs="*",
        metavar="K",
        help="numbers of experts to measure cross entropy with (default: that of --topk; without a number "
        "nothing is measured)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of first centres and random cuts (default: 0)"
    )
    parser.set_defaults(prepare=_prepare)


def moefied(
    model: ModelConfig, experts: int, topk: int, router_hidden_size: int | None = None
) -> ModelConfig:
    """The architecture of the result, whose routers are linear where they have no hidden size.

    Raises:
        ConfigurationError: the model is not dense, or cannot be cut so.
    """
    kinds = {layer.feed_forward.name for layer in layers(model)}
    if kinds != {"dense"}:
        raise ConfigurationError(
            f"--model has feed-forwards of the kinds {', '.join(sorted(kinds))}; moefy cuts dense ones in "
            "every layer"
        )
    width = model.ffn_hidden_size
    if experts < 1 or width % experts:
        raise ConfigurationError(
            f"--experts {experts} does not divide the feed-forward's {width} neurons; valid are "
            f"{either(divisors(width))}"
        )
    if not 1 <= topk <= experts:
        raise ConfigurationError(f"--topk {topk} must be 1 to {experts}, the number of --experts")
    moe = MoEConfig(
        num_experts=experts,
        router_topk=topk,
        router_weights=RouterWeights.ones,
        router_hidden_size=router_hidden_size,
        num_shared_experts=0,
        moe_ffn_hidden_size=width // experts,
        # Experts are parts of one function: even loads are no aim, and nothing may pull routers away from it.
        aux_loss_coeff=0.0,
        z_loss_coeff=0.0,
    )
    target = replace(model, feed_forwards=["moe"], moe=moe)
    check_model(target)
    return target


def _prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    check_text_options(arguments)
    if arguments.windows < 2 or arguments.windows % 2:
        raise ConfigurationError(
            f"--windows is {arguments.windows}; give an even number, half to fit on and half to measure on"
        )
    if arguments.world_size > 1:
        raise ConfigurationError(
            "moefy runs in one process; leave --nproc-per-node out, and lay the result out for ranks with "
            "spikingbrain-convert reshard"
        )
    if not is_megatron_checkpoint(arguments.model):
        raise ConfigurationError(
            f"--model {arguments.model} is no Megatron checkpoint; import the folder with "
            "spikingbrain-convert import first"
        )
    checkpoint = resolve_checkpoint(arguments.model, "--model")
    _target(read_stored_model(checkpoint), arguments)
    for k in arguments.measure or ():
        if not 1 <= k <= arguments.experts:
            raise ConfigurationError(
                f"--measure has {k}; give 1 to {arguments.experts}, the number of --experts"
            )
    check_output(arguments, checkpoint, LATEST_ITERATION_FILE)
    return reading_of(arguments, _no_folder, _cut)


def _target(model: ModelConfig, arguments: argparse.Namespace) -> ModelConfig:
    """Raises ConfigurationError."""
    hidden = arguments.router_hidden_size
    if hidden is not None and arguments.router != "mlp":
        raise ConfigurationError(
            f"--router-hidden-size {hidden} is of --router mlp, but --router is {arguments.router}; leave it "
            "out, or choose mlp"
        )
    if hidden is not None and hidden < 1:
        raise ConfigurationError(f"--router-hidden-size is {hidden}; give at least 1 channel")
    if arguments.router == "mlp":
        hidden = hidden or model.hidden_size
    return moefied(model, arguments.experts, arguments.topk, hidden)


def _no_folder(_: argparse.Namespace) -> None:
    raise AssertionError("a Hugging Face folder has been refused")


def _cut(request: CheckpointRequest, tokenizer: Path, arguments: argparse.Namespace) -> None:
    with neurons_of_checkpoint(request, tokenizer, arguments) as neurons:
        from spikingbrain_train.bricks.moefy import run

        run(neurons, request.checkpoint, _target(request.model, arguments), arguments)
