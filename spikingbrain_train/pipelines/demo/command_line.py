"""Arguments of spikingbrain-demo: conf/pipeline/demo.yaml under the names of `make demo`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spikingbrain_train.config.command_line import command_parser, user_errors
from spikingbrain_train.pipelines.command_line import run, show_plan
from spikingbrain_train.pipelines.demo.budget import DEFAULT_MINUTES
from spikingbrain_train.pipelines.pipeline_file import PipelineFile, load_pipeline
from spikingbrain_train.pipelines.state import STATE_FILE
from spikingbrain_train.storage.durable_files import write_text_durably

PIPELINE = "demo"
_TEXT_SUFFIXES = (".txt", ".md", ".rst")
_DOCUMENT_CHARS = 4000
"""A book is cut into documents of that size, or there would be nothing to hold out."""
_EARLIER_STATE_FILE = "demo_state.json"
"""Of demos before there were pipelines."""

_DESCRIPTION = """\
Turn a dense model into a SpikingBrain hybrid, from end to end: tokenize text, convert, align, continue
pretraining, export, evaluate, generate. Every step is a command that is printed before it runs. A second
call skips what is finished and goes on where the first one stopped. The steps are those of
conf/pipeline/demo.yaml, which spikingbrain-pipeline runs, too.
"""

_EXAMPLES = """\
examples:
  # SmolLM2-135M on Python's own documentation
  spikingbrain-demo --output outputs/demo

  # another model and text; stages of another length
  spikingbrain-demo --output outputs/qwen --model models/Qwen2.5-0.5B --data 'corpus/*.jsonl' \\
      --align-args stage.train_iters=200 --cpt-args stage.train_iters=400

  # half an hour instead of twelve minutes, on a machine that cannot take the whole recipe in those
  spikingbrain-demo --output outputs/demo --budget 30

  # only show the commands
  spikingbrain-demo --output outputs/demo --dry-run

The downloaded model is kept in the folder that SPIKINGBRAIN_CACHE names, in .cache of a checkout, or in
~/.cache/spikingbrain-train.
"""


def demo(arguments: Sequence[str] | None = None) -> None:
    """``spikingbrain-demo``."""
    parsed = parse_arguments(arguments)
    with user_errors():
        file = demo_pipeline(parsed)
        if parsed.dry_run:
            show_plan(file)
            return
        _take_over(parsed.output)
        run(file, fresh=parsed.fresh)


def demo_pipeline(parsed: argparse.Namespace) -> PipelineFile:
    """The pipeline that the command line asks for; what it does not name is as the YAML says."""
    given = {
        "output": str(parsed.output),
        "model": None if parsed.model is None else str(parsed.model),
        "data": parsed.data,
        "text_key": parsed.text_key,
        "prompt": parsed.prompt,
        "budget": parsed.budget,
        "align_args": parsed.align_args,
        "cpt_args": parsed.cpt_args,
    }
    if parsed.data is not None:
        stem = parsed.data[0].removesuffix(".gz").removesuffix(".zst")
        if len(parsed.data) == 1 and stem.endswith(_TEXT_SUFFIXES):
            given["max_text_chars"] = _DOCUMENT_CHARS
        given["prompt"] = parsed.prompt if parsed.prompt is not None else "The"
    return load_pipeline(PIPELINE, values={name: value for name, value in given.items() if value is not None})


def _take_over(output: Path) -> None:
    """A folder that a demo filled before there were pipelines is ours; all of its steps are done anew."""
    earlier = output / _EARLIER_STATE_FILE
    if earlier.is_file() and not (output / STATE_FILE).exists():
        write_text_durably(output / STATE_FILE, "{}\n")
        earlier.unlink()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line of spikingbrain-demo."""
    return demo_parser().parse_args(arguments)


def demo_parser() -> argparse.ArgumentParser:
    """The flags of ``spikingbrain-demo``."""
    parser = command_parser(_DESCRIPTION, _EXAMPLES)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of all results")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="dense Llama, Qwen2/2.5 or Qwen3 folder with safetensors "
        "(default: SmolLM2-135M-Instruct, downloaded once)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="text or JSON lines: files, folders, globs "
        "(default: the documentation topics that every Python carries)",
    )
    parser.add_argument("--text-key", metavar="KEY", help="JSON field that holds the text (default: text)")
    parser.add_argument("--prompt", metavar="TEXT", help="text that the exported model goes on from")
    parser.add_argument("--align-args", nargs="+", metavar="NAME=VALUE", help="settings of the align stage")
    parser.add_argument("--cpt-args", nargs="+", metavar="NAME=VALUE", help="settings of the cpt stage")
    parser.add_argument(
        "--budget",
        type=float,
        default=DEFAULT_MINUTES,
        metavar="MINUTES",
        help="time that the demo aims at; on a machine too slow for the whole recipe, stages and evaluation "
        "are shortened to fit (default: %(default)g)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over: remove the results of earlier calls"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    return parser
