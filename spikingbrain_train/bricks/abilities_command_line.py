"""Arguments of ``spikingbrain-bricks abilities``, understood before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spikingbrain_train.bricks.named_texts import named_texts
from spikingbrain_train.bricks.output_files import ABILITIES_NEURONS, ABILITIES_NUMBERS, ABILITIES_PICTURE
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.checkpoint_request import CheckpointRequest
from spikingbrain_train.evaluation.inference_command_line import add_inference_options
from spikingbrain_train.evaluation.reading_command_line import (
    add_window_options,
    check_text_options,
    open_folder,
    ranks_for_reading,
    reading_of,
)
from spikingbrain_train.planning.file_checks import check_output_folder

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
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"folder for {ABILITIES_NUMBERS}, {ABILITIES_NEURONS}, {ABILITIES_PICTURE} (else tables only)",
    )
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
    check_text_options(arguments)
    if arguments.windows < 2 or arguments.windows % 2:
        raise ConfigurationError(
            f"--windows is {arguments.windows}; give an even number, half to score on and half to read"
        )
    if not 0 < arguments.prune < 100:
        raise ConfigurationError(f"--prune is {arguments.prune:g}; give percent above 0 and below 100")
    if arguments.output is not None:
        check_output_folder(arguments.output, "--output")
    return reading_of(arguments, _read_folder, _read_checkpoint)


def _read_folder(arguments: argparse.Namespace) -> None:
    model, tokenizer = open_folder(arguments)
    from spikingbrain_train.bricks.hugging_face import hugging_face_neurons
    from spikingbrain_train.bricks.run_abilities import run

    run(hugging_face_neurons(model, tokenizer, str(arguments.model)), arguments)


def _read_checkpoint(request: CheckpointRequest, tokenizer: Path, arguments: argparse.Namespace) -> None:
    with ranks_for_reading(request, arguments, "which would count") as groups:
        if groups.data_parallel_size * groups.context_parallel_size > 1:
            raise ConfigurationError(
                f"abilities looks at windows one by one, but {groups.world_size} ranks would read "
                f"{groups.data_parallel_size} at once, each split over {groups.context_parallel_size}; start "
                "as many ranks as tensor x pipeline parallelism takes"
            )
        from spikingbrain_train.bricks.megatron import megatron_neurons
        from spikingbrain_train.bricks.run_abilities import run
        from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer

        run(megatron_neurons(request, groups, TextTokenizer(tokenizer), arguments.seq_length), arguments)
