"""Arguments of ``spikingbrain-bricks abilities``, understood before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spikingbrain_train.bricks.named_texts import named_texts
from spikingbrain_train.bricks.open_neurons import neurons_of_checkpoint, neurons_of_folder
from spikingbrain_train.bricks.output_files import ABILITIES_NEURONS, ABILITIES_NUMBERS, ABILITIES_PICTURE
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.checkpoint_request import CheckpointRequest
from spikingbrain_train.evaluation.inference_command_line import add_inference_options
from spikingbrain_train.evaluation.reading_command_line import (
    add_output_folder,
    add_window_options,
    check_reading,
    reading_of,
)

_DESCRIPTION = """\
Which neurons the abilities of a model rest on, each ability given by a text of its kind: neurons are scored
by how well they tell windows of one text from those of the others, the highest of each are left out, and all
texts are read again. Neurons are scored on the first half of each text's windows and measured on the second.
"""

_EXAMPLES = """\
examples:
  spikingbrain-bricks abilities --model models/SmolLM2-135M-Instruct --output outputs/abilities \\
      --texts docs=docs.jsonl topics=pydoc-topics --prune 2

In --output: abilities.json (matrix, overlap, resident neurons), abilities.safetensors (of every ability and
feed-forward [channels] uint8: 1 is a neuron of it) and abilities.png.
"""


def add_abilities(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-bricks``."""
    parser = commands.add_parser(
        "abilities",
        help="neurons that abilities rest on, and all abilities without those of one",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_inference_options(parser, output_file=False)
    add_output_folder(parser, ABILITIES_NUMBERS, ABILITIES_NEURONS, ABILITIES_PICTURE)
    parser.add_argument(
        "--texts",
        nargs="+",
        required=True,
        metavar="NAME=FILE",
        help="two or more abilities, each with text of its kind: a file (.txt, .jsonl, compressed or not), a "
        "folder, a glob, or pydoc-topics",
    )
    parser.add_argument(
        "--prune",
        type=float,
        default=2.0,
        metavar="PERCENT",
        help="neurons of every feed-forward that are an ability's and are left out (default: %(default)g)",
    )
    add_window_options(
        parser,
        windows=8,
        seq_length=256,
        of_windows="windows of each text, half of them to score neurons on",
    )
    parser.set_defaults(prepare=_prepare, data=None)


def _prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    arguments.texts = named_texts("--texts", arguments.texts, "ability")
    check_reading(arguments)
    if arguments.windows < 2 or arguments.windows % 2:
        raise ConfigurationError(
            f"--windows is {arguments.windows}; give an even number, half to score on and half to read"
        )
    if not 0 < arguments.prune < 100:
        raise ConfigurationError(f"--prune is {arguments.prune:g}; give percent above 0 and below 100")
    return reading_of(arguments, _read_folder, _read_checkpoint)


def _read_folder(arguments: argparse.Namespace) -> None:
    neurons = neurons_of_folder(arguments)
    from spikingbrain_train.bricks.run_abilities import run

    run(neurons, arguments)


def _read_checkpoint(request: CheckpointRequest, tokenizer: Path, arguments: argparse.Namespace) -> None:
    with neurons_of_checkpoint(
        request, tokenizer, arguments, every_window="abilities looks at windows one by one"
    ) as neurons:
        from spikingbrain_train.bricks.run_abilities import run

        run(neurons, arguments)
