"""Arguments of ``spikingbrain-bricks route``, understood before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from spikingbrain_train.bricks.named_texts import named_texts
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.inference_command_line import add_inference_options, check_model_files
from spikingbrain_train.evaluation.reading_command_line import add_window_options
from spikingbrain_train.evaluation.window_checks import check_windows

_DESCRIPTION = """\
Which brick, an adapter say, a prompt should be answered with: that whose sample texts it is most like, by the
cosine of the model's mean last hidden states. Half of each text's windows make a brick's embedding; the other
half says how often such a text finds its own brick.
"""

_EXAMPLES = """\
examples:
  spikingbrain-bricks route --model models/base --bricks code=code.jsonl essays=essays.txt \\
      --prompt "def add(a, b):" "It was a dark evening"

  # every document of a file, with choices and scores as JSON
  spikingbrain-bricks route --model models/base --bricks code=code.jsonl essays=essays.txt \\
      --prompts questions.jsonl --output choices.json
"""


def add_route(commands: Any) -> None:
    """Add it to the subcommands of ``spikingbrain-bricks``."""
    parser = commands.add_parser(
        "route",
        help="the brick that a prompt is most like, by the bricks' sample texts",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_inference_options(parser)
    parser.add_argument(
        "--bricks",
        nargs="+",
        required=True,
        metavar="NAME=FILE",
        help="two or more bricks, each with text of its kind: a file (.txt, .jsonl, compressed or not), a "
        "folder, a glob, or pydoc-topics",
    )
    parser.add_argument("--prompt", nargs="*", default=[], metavar="TEXT", help="texts to choose a brick for")
    parser.add_argument("--prompts", metavar="FILE", help="or the documents of a file")
    add_window_options(
        parser,
        windows=8,
        seq_length=128,
        of_windows="windows of each brick's text, half of them held out",
        of_length="tokens of a window, and the most that is read of a prompt",
    )
    parser.set_defaults(prepare=_prepare)


def _prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    arguments.bricks = named_texts("--bricks", arguments.bricks, "brick")
    check_windows(arguments.windows, arguments.seq_length)
    if arguments.windows < 2 or arguments.windows % 2:
        raise ConfigurationError(
            f"--windows is {arguments.windows}; give an even number, half of which is held out"
        )
    if check_model_files(arguments):
        raise ConfigurationError(
            f"--model {arguments.model} is a Megatron checkpoint; route reads a Hugging Face folder, which "
            "spikingbrain-export makes of it"
        )

    def run() -> None:
        from spikingbrain_train.bricks.run_route import run

        run(arguments)

    return run
