"""Arguments of ``spikingbrain-bricks predictors``, understood before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spikingbrain_train.activation_sparsity.zero_checks import nothing_is_zero
from spikingbrain_train.bricks.open_neurons import neurons_of_checkpoint
from spikingbrain_train.bricks.output_files import (
    PREDICTORS_NUMBERS,
    PREDICTORS_PICTURE,
    PREDICTORS_WEIGHTS,
)
from spikingbrain_train.config.model import ActivationFunc
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.evaluation.checkpoint_request import CheckpointRequest
from spikingbrain_train.evaluation.inference_command_line import add_inference_options
from spikingbrain_train.evaluation.reading_command_line import (
    add_output_folder,
    add_text_options,
    check_reading,
    open_folder,
    reading_of,
)

_WINDOWS, _HELD_OUT, _EPOCHS = 40, 8, 20
_RECALLS = (0.9, 0.95, 0.99)

_DESCRIPTION = """\
Train a small network for every feed-forward that tells from its input which neurons will be active, as
PowerInfer (arXiv 2312.12456) and Deja Vu (arXiv 2310.17157) use them to leave out the gate, too, of neurons
that are zero. The model is one with ReLU, FATReLU or squared ReLU, and stays as it is: it reads text, what
its feed-forwards read and which neurons are active is recorded, and two linears learn the one from the other.
On the last windows of the text, which are not learnt from: how many of the active neurons are found, how many
are left out, and what cross entropy becomes when only neurons are computed that are expected to be active.
"""

_EXAMPLES = """\
examples:
  # predictors of a model that ProSparse made, with cut-offs that find 90, 95 and 99 % of its active neurons
  spikingbrain-bricks predictors --model outputs/relu/cpt --text docs.jsonl --output outputs/predictors

  # more text, wider predictors, one cut-off
  spikingbrain-bricks predictors --model outputs/relu/cpt --text docs.jsonl --windows 400 --held-out 20 \\
      --hidden 512 --recall 0.98 --output outputs/predictors

In --output: predictors.json (every number), predictors.safetensors (of every feed-forward layers.<n>.<name>
fc1.weight [hidden, h], fc2.weight [neurons, hidden] and cutoffs, one for each --recall, float32: a neuron is
expected where fc2 relu(fc1 x) is at least the cut-off) and predictors.png.
"""


def add_predictors(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-bricks``."""
    parser = commands.add_parser(
        "predictors",
        help="small networks that tell which neurons will be active (PowerInfer)",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_inference_options(parser, output_file=False)
    add_output_folder(parser, PREDICTORS_NUMBERS, PREDICTORS_WEIGHTS, PREDICTORS_PICTURE)
    add_text_options(parser)
    parser.set_defaults(windows=_WINDOWS)
    parser.add_argument(
        "--held-out",
        type=int,
        default=_HELD_OUT,
        metavar="N",
        help="of the windows, the last ones, on which is measured (default: %(default)s)",
    )
    parser.add_argument(
        "--hidden",
        type=int,
        metavar="N",
        help="width between the two linears of a predictor (default: a quarter of the model's hidden size)",
    )
    parser.add_argument(
        "--recall",
        type=float,
        nargs="+",
        default=list(_RECALLS),
        metavar="R",
        help="shares of the active neurons to find: of each the highest cut-off of every predictor that does "
        "on windows kept back from training (default: "
        f"{' '.join(f'{each:g}' for each in _RECALLS)}; a probability of one half is always measured, too)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=_EPOCHS,
        metavar="N",
        help="readings of what was recorded, at most: training ends where windows that are kept back gain "
        "nothing (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of first weights and orders (default: %(default)s)"
    )
    parser.set_defaults(prepare=_prepare)


def _prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    check_reading(arguments)
    if arguments.held_out < 1 or arguments.windows - arguments.held_out < 2:
        raise ConfigurationError(
            f"--held-out is {arguments.held_out} of {arguments.windows} windows; give at least 1, and at "
            "least 2 more --windows to learn from and to choose cut-offs on"
        )
    for name in ("hidden", "epochs"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigurationError(f"--{name} is {value}; give at least 1")
    for each in arguments.recall:
        if not 0 < each <= 1:
            raise ConfigurationError(f"--recall has {each:g}; give shares above 0 and at most 1")
    arguments.recall = sorted(set(arguments.recall))
    return reading_of(arguments, _read_folder, _read_checkpoint)


def _read_folder(arguments: argparse.Namespace) -> None:
    model, tokenizer = open_folder(arguments)
    from spikingbrain_train.activation_sparsity.hugging_face import check_zeros
    from spikingbrain_train.bricks.hugging_face import hugging_face_neurons
    from spikingbrain_train.bricks.run_predictors import run

    neurons = hugging_face_neurons(model, tokenizer, str(arguments.model))
    check_zeros(model, str(arguments.model))
    run(neurons, arguments)


def _read_checkpoint(request: CheckpointRequest, tokenizer: Path, arguments: argparse.Namespace) -> None:
    activation = request.model.activation_func
    if activation is ActivationFunc.silu:
        raise CheckpointError(nothing_is_zero(str(request.checkpoint), activation.value))
    because = "a predictor learns from all windows"
    with neurons_of_checkpoint(request, tokenizer, arguments, every_window=because) as neurons:
        from spikingbrain_train.bricks.run_predictors import run

        run(neurons, arguments)
