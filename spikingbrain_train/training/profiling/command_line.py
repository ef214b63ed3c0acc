"""Arguments of spikingbrain-profile-step, understood before torch is imported."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spikingbrain_train.config.command_line import command_parser, user_errors
from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.inference_command_line import Elsewhere
from spikingbrain_train.planning.checks import check_run_config
from spikingbrain_train.planning.file_checks import check_output_folder
from spikingbrain_train.planning.launch import Launch
from spikingbrain_train.reporting.activity import activity

_NO_NOTICES = "99"
_MOST_STEPS = 100
"""All events of the profiled ones are kept in memory, some hundred thousand a step."""
_DESCRIPTION = """\
Take some training steps of a run under torch's profiler and say what they went to: a table by part
(embedding, each kind of mixer and feed-forward, norms, transforms, output and loss, optimizer, gradient
reduction, data, ...) with forward and backward pass, share of the step, how much of it are matrix products
and what share of the machine's peak these reach over the part's whole time; and the longest operators.
Nothing is trained: weights, checkpoints and the run's own output_dir stay as they are.
"""

_EXAMPLES = """\
examples:
  # a small hybrid at the length that you will train
  spikingbrain-profile-step --output profiles/tiny model=tiny_hybrid stage.seq_length=2048 \\
      'data.train=[data/web_train]'

  # a layout on four ranks: the table has the mean and the slowest rank; then one rank of them alone
  spikingbrain-profile-step --nproc-per-node 4 --output profiles/tp2 experiment=smollm2_cpt parallel=tp2
  spikingbrain-profile-step --nproc-per-node 4 --output profiles/tp2 --ranks 3 experiment=smollm2_cpt \\
      parallel=tp2

files in --output:
  profile.json     all numbers of the table
  profile.png      the same as bars
  trace.json.gz    every operator of the first profiled rank in time: open it in ui.perfetto.dev

How to read the table: rows add up to the step. Operators of the backward pass belong to the part whose
forward operator made them; norms inside a mixer are norms, waits for other ranks are "communication", and
what lies in no part (residual additions, Python) is "rest". TFLOP/s counts matrix products over the whole
time of the part: a low value beside a high "in products" means slow products, beside a low one time
elsewhere. On a GPU the time is that of kernels, and "rest" is also when none ran. The profiler itself costs
time, mostly where operators are small: the first line has a step without it. More in docs/profiling.md.
"""


def profile_step_parser() -> argparse.ArgumentParser:
    """The flags of spikingbrain-profile-step."""
    parser = command_parser(_DESCRIPTION, _EXAMPLES)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--steps", type=int, default=1, metavar="N", help="steps to profile (default: %(default)s)"
    )
    parser.add_argument(
        "--warm-up",
        type=int,
        default=2,
        metavar="N",
        help="steps before them, which load libraries and tune kernels (default: %(default)s); from two on "
        "the last is timed",
    )
    parser.add_argument(
        "--ranks",
        default="all",
        metavar="R,R",
        help="numbers of the ranks that are profiled, or all (default: %(default)s)",
    )
    parser.add_argument(
        "settings",
        nargs="+",
        metavar="NAME=VALUE",
        help="settings of the run, as spikingbrain-train takes them",
    )
    return parser


def profile_step(arguments: Sequence[str] | None = None, *, elsewhere: Elsewhere | None = None) -> None:
    """spikingbrain-profile-step."""
    with user_errors(same_on_all_ranks=True):
        parsed = profile_step_parser().parse_intermixed_args(arguments)
        for flag, number, least in (("--steps", parsed.steps, 1), ("--warm-up", parsed.warm_up, 0)):
            if not least <= number <= _MOST_STEPS:
                raise ConfigurationError(f"{flag} is {number}; give {least} to {_MOST_STEPS}")
        world_size = Launch.from_environment().world_size if elsewhere is None else elsewhere.world_size
        ranks = _ranks(parsed.ranks, world_size)
        check_output_folder(parsed.output, "--output")
        # The run's own folder is not touched, and may hold one that is done.
        config = to_run_config(compose_run([*parsed.settings, f"output_dir={parsed.output / 'run'}"]))
        steps = parsed.steps + parsed.warm_up
        config = replace(
            config, stage=replace(config.stage, train_iters=max(steps, config.stage.train_iters))
        )
        check_run_config(config, world_size)
    with user_errors():
        if elsewhere is not None:
            elsewhere.start()
            return
        # torch's tracing library says on standard error when it begins and ends; it reads this when loaded.
        os.environ.setdefault("KINETO_LOG_LEVEL", _NO_NOTICES)
        from spikingbrain_train.runtime.quiet_torch import ignore_megatron_warnings

        with activity("importing torch and megatron-core", shown=os.environ.get("RANK", "0") == "0"):
            ignore_megatron_warnings()
            from spikingbrain_train.training.profiling.profile import Request, profile_step
        profile_step(Request(config, parsed.output, parsed.warm_up, parsed.steps, ranks))


def _ranks(text: str, world_size: int) -> tuple[int, ...] | None:
    if text == "all":
        return None
    words = text.split(",")
    if not all(word.isdecimal() and int(word) < world_size for word in words):
        raise ConfigurationError(
            f"--ranks {text}: give all, or numbers from 0 to {world_size - 1} with commas between them"
        )
    return tuple(sorted({int(word) for word in words}))
