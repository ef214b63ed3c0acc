"""Arguments of spikingbrain-cache-teacher, understood before torch is imported."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from spikingbrain_train.config.command_line import command_parser, user_errors
from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.evaluation.inference_command_line import Elsewhere
from spikingbrain_train.planning.launch import Launch
from spikingbrain_train.planning.teacher_cache_request import facts, request_cache
from spikingbrain_train.reporting.activity import activity

_DESCRIPTION = """\
Run the dense source once over the samples of a distill run and keep of each token's distribution its
likeliest tokens, some drawn among the others, and how much mass those have. The run then reads them instead
of the teacher: add stage.distillation.cache=DIR to its settings. Stopped, the same command goes on; files
that are there are not written again. docs/distillation.md says what is kept, and why.
"""

_EXAMPLES = """\
examples:
  # what it would take: bytes, files, time
  spikingbrain-cache-teacher --output caches/smollm2 --dry-run experiment=smollm2_cpt

  # write it, then train from it
  spikingbrain-cache-teacher --output caches/smollm2 experiment=smollm2_cpt
  spikingbrain-train experiment=smollm2_cpt stage.distillation.cache=caches/smollm2

  # on eight ranks, the teacher split over two of them
  spikingbrain-cache-teacher --nproc-per-node 8 --output caches/7b experiment=spikingbrain_7b_distill \\
      parallel=tp2 'data.train=[data/web_train]'
"""


def cache_teacher_parser() -> argparse.ArgumentParser:
    """The flags of spikingbrain-cache-teacher."""
    parser = command_parser(_DESCRIPTION, _EXAMPLES)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the cache")
    parser.add_argument(
        "--top-k",
        type=int,
        default=64,
        metavar="K",
        help="likeliest tokens to keep of each distribution (default: %(default)s)",
    )
    parser.add_argument(
        "--tail-samples",
        type=int,
        default=64,
        metavar="M",
        help="tokens to draw among the others, so that the loss is unbiased (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what it would take, and write nothing")
    parser.add_argument(
        "settings",
        nargs="+",
        metavar="NAME=VALUE",
        help="settings of the run that will read the cache, as spikingbrain-train takes them; parallel=... "
        "may differ",
    )
    return parser


def cache_teacher(arguments: Sequence[str] | None = None, *, elsewhere: Elsewhere | None = None) -> None:
    """spikingbrain-cache-teacher."""
    with user_errors(same_on_all_ranks=True):
        parsed = cache_teacher_parser().parse_intermixed_args(arguments)
        world_size = Launch.from_environment().world_size if elsewhere is None else elsewhere.world_size
        config = to_run_config(compose_run(parsed.settings))
        request = request_cache(
            config, parsed.output, top=parsed.top_k, drawn=parsed.tail_samples, world_size=world_size
        )
        if parsed.dry_run:
            if os.environ.get("RANK", "0") == "0":
                print(facts(request.describe(world_size)))
            return
    with user_errors():
        if elsewhere is not None:
            elsewhere.start()
            return
        from spikingbrain_train.runtime.quiet_torch import ignore_megatron_warnings

        with activity("importing torch and megatron-core", shown=os.environ.get("RANK", "0") == "0"):
            ignore_megatron_warnings()
            from spikingbrain_train.training.teacher_cache import write_cache
        write_cache(request)
        sys.stdout.flush()
