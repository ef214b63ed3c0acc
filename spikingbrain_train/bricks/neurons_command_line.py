"""Arguments of ``spikingbrain-bricks neurons``, understood before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spikingbrain_train.bricks.open_neurons import neurons_of_checkpoint, neurons_of_folder
from spikingbrain_train.bricks.output_files import NEURONS_MEANS, NEURONS_NUMBERS, NEURONS_PICTURE
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.checkpoint_request import CheckpointRequest
from spikingbrain_train.evaluation.inference_command_line import add_inference_options
from spikingbrain_train.evaluation.reading_command_line import (
    add_output_folder,
    add_text_options,
    check_reading,
    reading_of,
)

_MASKED = (0.0, 30.0, 50.0, 70.0, 80.0, 90.0)

_DESCRIPTION = """\
What the neurons of a model's feed-forwards do on text: the activation of each, and the norm of what it adds
to the residual stream (its activation times the norm of its column of the down projection). How unevenly
these are spread, and what cross entropy becomes when the weakest neurons of every token are left out.
"""

_EXAMPLES = """\
examples:
  # a dense model, with neurons.json, neurons.safetensors and neurons.png in a folder
  spikingbrain-bricks neurons --model models/SmolLM2-135M-Instruct --text docs.jsonl --output outputs/neurons

  # the newest checkpoint of a run, other shares left out
  spikingbrain-bricks neurons --model outputs/smollm2/cpt --text docs.jsonl --mask 50 60 70 75 80

In --output: neurons.json (distributions and curve), neurons.safetensors (of every feed-forward [channels]
float32: mean magnitude of activations and mean output norm) and neurons.png.
"""


def add_neurons(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-bricks``."""
    parser = commands.add_parser(
        "neurons",
        help="activations and output norms of all neurons, and the model without the weakest",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_inference_options(parser, output_file=False)
    add_output_folder(parser, NEURONS_NUMBERS, NEURONS_MEANS, NEURONS_PICTURE)
    add_text_options(parser)
    parser.add_argument(
        "--mask",
        type=float,
        nargs="*",
        default=list(_MASKED),
        metavar="PERCENT",
        help="neurons of every feed-forward to leave out at each token, those of the lowest output norm "
        f"(default: {' '.join(f'{each:g}' for each in _MASKED)})",
    )
    parser.set_defaults(prepare=_prepare)


def _prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    check_reading(arguments)
    for percent in arguments.mask:
        if not 0 <= percent < 100:
            raise ConfigurationError(f"--mask has {percent:g}; give percent of at least 0 and below 100")
    return reading_of(arguments, _read_folder, _read_checkpoint)


def _read_folder(arguments: argparse.Namespace) -> None:
    neurons = neurons_of_folder(arguments)
    from spikingbrain_train.bricks.run_neurons import run

    run(neurons, arguments)


def _read_checkpoint(request: CheckpointRequest, tokenizer: Path, arguments: argparse.Namespace) -> None:
    with neurons_of_checkpoint(request, tokenizer, arguments) as neurons:
        from spikingbrain_train.bricks.run_neurons import run

        run(neurons, arguments)
