"""Arguments of tools/demo.py."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spikingbrain_train.config.command_line import user_errors
from spikingbrain_train.pipelines.demo.budget import DEFAULT_MINUTES, check_minutes, recall, remember
from spikingbrain_train.pipelines.demo.report import write_report
from spikingbrain_train.pipelines.demo.runner import Runner, printable
from spikingbrain_train.pipelines.demo.steps import (
    MEASURE,
    PYDOC_TOPICS,
    DemoOptions,
    demo_steps,
    fitted_lengths,
    step_keys,
)

_DESCRIPTION = """\
Turn a dense model into a SpikingBrain hybrid, from end to end: tokenize text, convert, align, continue
pretraining, export, evaluate, generate. Every step is a command that is printed before it runs. A second
call skips what is finished and goes on where the first one stopped.
"""

_EXAMPLES = """\
examples:
  # SmolLM2-135M on Python's own documentation
  python tools/demo.py --output outputs/demo

  # another model and text; stages of another length
  python tools/demo.py --output outputs/qwen --model models/Qwen2.5-0.5B --data 'corpus/*.jsonl' \\
      --align-args stage.train_iters=200 --cpt-args stage.train_iters=400

  # half an hour instead of twelve minutes, on a machine that cannot take the whole recipe in those
  python tools/demo.py --output outputs/demo --budget 30

  # only show the commands
  python tools/demo.py --output outputs/demo --dry-run

The downloaded model is kept in .cache of the checkout, or in the folder that SPIKINGBRAIN_CACHE names.
"""


def demo(root: Path, arguments: Sequence[str] | None = None) -> None:
    """tools/demo.py.

    Args:
        root: the checkout that holds train.py and tools/.
        arguments: the command line; None takes the process's own.
    """
    parser = argparse.ArgumentParser(
        prog="demo.py",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
        default=[PYDOC_TOPICS],
        metavar="PATH",
        help="text or JSON lines: files, folders, globs "
        "(default: the documentation topics that every Python carries)",
    )
    parser.add_argument("--text-key", metavar="KEY", help="JSON field that holds the text (default: text)")
    parser.add_argument("--prompt", metavar="TEXT", help="text that the exported model goes on from")
    parser.add_argument(
        "--align-args", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the align stage"
    )
    parser.add_argument(
        "--cpt-args", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the cpt stage"
    )
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
    parsed = parser.parse_args(arguments)
    with user_errors():
        options = DemoOptions(
            root=root,
            output=parsed.output,
            cache=Path(os.environ.get("SPIKINGBRAIN_CACHE") or root / ".cache"),
            model=parsed.model,
            data=parsed.data,
            text_key=parsed.text_key,
            prompt=parsed.prompt,
            align_args=parsed.align_args,
            cpt_args=parsed.cpt_args,
        )
        check_minutes(parsed.budget)
        steps = demo_steps(options)
        if parsed.dry_run:
            if options.fits_lengths:
                print("# Lengths of the whole recipe; a slower machine gets shorter stages, see --budget.\n")
            for step in steps:
                print(f"# {step.title}\n{printable(step.command)}\n")
            return
        runner = Runner(options.output)
        if parsed.fresh:
            runner.forget()
        if options.fits_lengths:
            runner.run(steps, through=MEASURE)
            key = json.dumps([parsed.budget, step_keys(steps)[[s.name for s in steps].index(MEASURE)]])
            lengths = None if parsed.fresh else recall(options.output, key)
            if lengths is None:
                lengths = fitted_lengths(options, parsed.budget, runner.seconds(steps, MEASURE))
                remember(options.output, key, lengths)
            print(f"\n{lengths.sentence}", flush=True)
            options = replace(options, lengths=lengths)
            steps = demo_steps(options)
        runner.run(steps)
        print(f"\n{write_report(options, steps, runner.records)}")
        sys.stdout.flush()
